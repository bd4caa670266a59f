"""The files of a run that is driven elsewhere, copied to the run's directory here while it goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.clusters.remote.shell import Shell
from launcher.errors import HostError, RunError
from launcher.runs import REMOTE, RunDirectory, write_json

EVERY_SECONDS = 5.0
_LONGEST_SECONDS = 3600.0
# Checkpoints, heartbeats and results are copied in ways of their own; the rest belongs to one machine.
_OF_A_RUN = ("checkpoints/", ".heartbeat", "result.json", ".probe*", ".stop", ".owner", ".requests/")
_EXCLUDED = (*(f"/{name}" for name in _OF_A_RUN), f"/{REMOTE}", "*.tmp", "*.lock", "*.gathering")
# Of a run, or of a sweep and its trials: complete checkpoints, results with the times of their last changes, heartbeats
# that are not old with their ages. Few processes, however many trials there are.
_LISTED = """\
cd {directory} 2>/dev/null || exit 0
echo "now $(date +%s)"
[ -f study.journal ] && echo sweep
for place in checkpoints/step-* */checkpoints/step-*; do [ -f "$place/manifest.json" ] && echo "step - $place"; done
find . -maxdepth 2 -name result.json -printf 'result %T@ %P\\n'
find . -maxdepth 2 -name .heartbeat -mmin -5 -printf 'beat %T@ %P\\n'
"""


class Copies:
    """One run or one sweep, there and here.

    Args:
        shell: of the head.
        directory: of the run there.
    """

    def __init__(self, shell: Shell, directory: str, run: RunDirectory) -> None:
        self._shell, self._directory, self._run = shell, directory, run
        self._results: dict[str, str] = {}  # place -> when the one that was copied had changed
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

    def bring(self) -> None:
        """Copy what has changed if the head can be reached."""
        with suppress(HostError, OSError):
            self.fetch()

    def _keep(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self.bring()  # where the network is away, the next time has it

    def fetch(self) -> None:
        """Copy what has changed. A checkpoint is copied when it is complete there, and is complete or absent here.

        Raises:
            HostError: the head cannot be reached.
        """
        with self._lock:
            listed = self._shell.run(_LISTED.format(directory=shlex.quote(self._directory)), what="looking at the run")
            lines = listed.splitlines()
            if not lines:
                return  # nothing is there yet
            now, sweep = int(lines[0].split()[1]), "sweep" in lines[:2]
            excluded = [*_EXCLUDED, *(f"/*/{name}" for name in _OF_A_RUN if sweep)]
            self._copy(f"{self._directory}/", self._run.path, [f"--exclude={pattern}" for pattern in excluded])
            beats, results, steps = (_facts(lines, kind, sweep) for kind in ("beat", "result", "step"))
            for place, when in beats.items():
                self._beat(place, now - float(when))
            self._copy_results(results)
            self._checkpoints({Path(place) for place in steps}, ("", "*/") if sweep else ("",))

    def _copy(self, there: str, here: Path, options: Sequence[str] = ()) -> bool:
        """Tell whether all of it came: what was deleted there meanwhile did not, and the next time has what is left."""
        try:
            self._shell.fetch(there, here, options, seconds=_LONGEST_SECONDS)
        except HostError as error:
            if error.cause != "failed":
                raise
            return False
        return True

    def _beat(self, place: str, age: float) -> None:
        """Have a heartbeat here be as old as the one there by the clock there. Whose it is matters there alone."""
        with suppress(OSError):
            path = self._run.path / place
            write_json(path, {"host": "", "pid": 0})
            when = time.time() - max(0.0, age)
            os.utime(path, (when, when))

    def _copy_results(self, there: dict[str, str]) -> None:
        """Copy the results that have changed, and name their checkpoints by their place here."""
        changed = [place for place, when in there.items() if self._results.get(place) != when]
        if not changed:
            return
        with tempfile.NamedTemporaryFile("w", prefix="launch-results-") as names:
            names.write("".join(f"{place}\n" for place in changed))
            names.flush()
            if not self._copy(f"{self._directory}/", self._run.path, [f"--files-from={names.name}"]):
                return
        for place in changed:
            run = RunDirectory((self._run.path / place).parent)
            with suppress(RunError, OSError):
                result = run.result()
                told = str(result.get("checkpoint") or "")
                if told and not told.startswith(str(run.path)):
                    result["checkpoint"] = str(run.checkpoints / Path(told).name)
                    run.write_result(result)
            self._results[place] = there[place]

    def _checkpoints(self, there: set[Path], runs: Sequence[str]) -> None:
        """Copy those that are there, the newest first, and remove those that are not kept there any more."""
        top = self._run.path
        here = {path.relative_to(top) for run in runs for path in top.glob(f"{run}checkpoints/step-*")}
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


def _facts(lines: Sequence[str], kind: str, sweep: bool) -> dict[str, str]:
    """Return place -> time of what was listed. Folders of a run are the user's, those of a sweep its trials."""
    found = {}
    for line in lines:
        if line.startswith(f"{kind} "):
            _, when, place = line.split(" ", 2)
            if sweep or place.count("/") == (kind == "step"):
                found[place] = when
    return found


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
