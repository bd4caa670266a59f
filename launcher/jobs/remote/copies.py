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
# Checkpoints and heartbeats are copied in ways of their own; the rest belongs to one machine.
_EXCLUDED = ("checkpoints/", ".heartbeat", f"/{REMOTE}", ".probe*", ".stop", ".owner", ".requests/", "*.tmp", "*.lock")
# Of a run, or of a sweep and its trials: complete checkpoints, and heartbeats with their ages.
_LISTED = """\
cd {directory} 2>/dev/null || exit 0
echo "there yes"
for place in checkpoints/step-* */checkpoints/step-*; do [ -f "$place/manifest.json" ] && echo "step $place"; done
for beat in .heartbeat */.heartbeat; do
  [ -f "$beat" ] || continue
  echo "beat $(( $(date +%s) - $(stat -c %Y "$beat") )) $beat $(tr -d '\\n' < "$beat")"
done
true
"""


class Copies:
    """One run or one sweep, there and here.

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
            facts = [line.split(" ", 1) for line in listed.splitlines()]
            if not facts:
                return  # nothing is there yet
            options = [f"--exclude={pattern}" for pattern in _EXCLUDED]
            self._copy(f"{self._directory}/", self._run.path, options)
            self._checkpoints({Path(told) for key, told in facts if key == "step"})
            for key, told in facts:
                if key == "beat":
                    self._beat(told)
            for run in (self._run, *self._trials()):
                self._own_words(run)

    def _trials(self) -> list[RunDirectory]:
        return [RunDirectory(found.parent) for found in self._run.path.glob("*/result.json")]

    def _copy(self, there: str, here: Path, options: Sequence[str] = ()) -> bool:
        """Tell whether all of it came: what was deleted there meanwhile did not, and the next time has what is left."""
        try:
            self._shell.fetch(there, here, options, seconds=_LONGEST_SECONDS)
        except HostError as error:
            if error.cause != "failed":
                raise
            return False
        return True

    def _checkpoints(self, there: set[Path]) -> None:
        """Copy those that are there, the newest first, and remove those that are not kept there any more."""
        top = self._run.path
        here = {path.relative_to(top) for places in ("", "*/") for path in top.glob(f"{places}checkpoints/step-*")}
        for place in sorted(there - here, key=lambda place: place.name, reverse=True):
            part = top / place.parent / f".{place.name}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            if self._copy(f"{self._directory}/{place}/", part) and (part / "manifest.json").is_file():
                os.replace(part, top / place)
            else:
                shutil.rmtree(part, ignore_errors=True)
        if there:
            for place in here - there:
                shutil.rmtree(top / place, ignore_errors=True)

    def _beat(self, told: str) -> None:
        """Have a heartbeat here be as old as the one there by the clock there."""
        with suppress(ValueError, OSError):
            age, place, beat = told.split(" ", 2)
            path = self._run.path / place
            write_json(path, json.loads(beat))
            when = time.time() - max(0, int(age))
            os.utime(path, (when, when))

    @staticmethod
    def _own_words(run: RunDirectory) -> None:
        """Name the checkpoint by its place here."""
        with suppress(RunError, OSError):
            result = run.result()
            told = str(result.get("checkpoint") or "")
            if told and not told.startswith(str(run.path)):
                write_json(run.path / "result.json", {**result, "checkpoint": str(run.checkpoints / Path(told).name)})


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
