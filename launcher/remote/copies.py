"""The files of a run that is driven elsewhere, copied to the run's directory here while it goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.clusters.shell import Shell
from launcher.errors import HostError, RunError
from launcher.runs import REMOTE, RunDirectory, write_json

EVERY_SECONDS = 5.0
_LONGEST_SECONDS = 3600.0
# Checkpoints and the heartbeat are copied in ways of their own; the rest belongs to one machine.
_EXCLUDED = ("/checkpoints/", "/.heartbeat", f"/{REMOTE}", "/.probe*", "/.stop", "/.owner", "/.requests/", "*.tmp")
_LISTED = """\
cd {directory} 2>/dev/null || exit 0
echo "there yes"
for place in checkpoints/step-*; do [ -f "$place/manifest.json" ] && echo "step $(basename "$place")"; done
[ -f .heartbeat ] || exit 0
echo "age $(( $(date +%s) - $(stat -c %Y .heartbeat) ))"
echo "beat $(tr -d '\\n' < .heartbeat)"
"""


class Copies:
    """One run, there and here.

    Args:
        shell: of the head.
        directory: of the run there.
    """

    def __init__(self, shell: Shell, directory: str, run: RunDirectory) -> None:
        self._shell, self._directory, self._run = shell, directory, run
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="launch-copies", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, last: bool = True) -> None:
        """End the copying. last: copy what is there now; a HostError is raised where that fails."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        if last:
            self.fetch()

    def _keep(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            with suppress(HostError, OSError):  # the network is away: the next time has it
                self.fetch()

    def fetch(self) -> None:
        """Copy what has changed. A checkpoint is copied when it is complete there, and is complete or absent here.

        Raises:
            HostError: the head cannot be reached.
        """
        with self._lock:
            listed = self._shell.run(_LISTED.format(directory=shlex.quote(self._directory)), what="looking at the run")
            facts = [line.partition(" ")[::2] for line in listed.splitlines()]
            if not facts:
                return  # nothing is there yet
            options = [f"--exclude={pattern}" for pattern in _EXCLUDED]
            self._copy(f"{self._directory}/", self._run.path, options)
            self._checkpoints({name for key, name in facts if key == "step"})
            self._beat(dict(facts))
            self._own_words()

    def _copy(self, there: str, here: Path, options: Sequence[str] = ()) -> bool:
        """Tell whether all of it came: what was deleted there meanwhile did not, and the next time has what is left."""
        try:
            self._shell.fetch(there, here, options, seconds=_LONGEST_SECONDS)
        except HostError as error:
            if error.cause != "failed":
                raise
            return False
        return True

    def _checkpoints(self, there: set[str]) -> None:
        folder = self._run.checkpoints
        folder.mkdir(exist_ok=True)
        here = {path.name for path in folder.glob("step-*")}
        for name in sorted(there - here, reverse=True):  # the newest first
            part = folder / f".{name}.part"
            if self._copy(f"{self._directory}/checkpoints/{name}/", part) and (part / "manifest.json").is_file():
                os.replace(part, folder / name)
            else:
                shutil.rmtree(part, ignore_errors=True)
        if there:
            for name in here - there:
                shutil.rmtree(folder / name, ignore_errors=True)

    def _beat(self, facts: dict[str, str]) -> None:
        """Have the heartbeat here be as old as the one there by the clock there."""
        with suppress(KeyError, ValueError, OSError):
            path = self._run.path / ".heartbeat"
            write_json(path, json.loads(facts["beat"]))
            when = time.time() - max(0, int(facts["age"]))
            os.utime(path, (when, when))

    def _own_words(self) -> None:
        """Name the checkpoint by its place here."""
        with suppress(RunError, OSError):
            result = self._run.result()
            told = str(result.get("checkpoint") or "")
            if told and not told.startswith(str(self._run.path)):
                local = self._run.checkpoints / Path(told).name
                write_json(self._run.path / "result.json", {**result, "checkpoint": str(local)})


def bring(shell: Shell, directory: str, run: RunDirectory) -> None:
    """Send a run that is continued to the head, unless the head has it as far as it is here.

    Raises:
        HostError: the head cannot be reached, or has no room.
    """
    there = shell.run(f"cat {shlex.quote(directory)}/result.json 2>/dev/null || true", what="looking at the run")
    with suppress(ValueError, TypeError):
        if json.loads(there)["steps"] >= (run.result().get("steps") or 0):
            return
    shell.send(run.path, None, directory, seconds=_LONGEST_SECONDS)
