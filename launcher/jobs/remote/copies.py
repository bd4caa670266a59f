"""Copies the files of a remote run from the head to the run's directory on this machine while the run is active."""

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
# Checkpoints, heartbeats and results are copied separately; the other files belong to one machine.
_OF_A_RUN = ("checkpoints/", ".heartbeat", "result.json", ".probe*", ".stop", ".owner", ".requests/")
_EXCLUDED = (*(f"/{name}" for name in _OF_A_RUN), f"/{REMOTE}", "*.tmp", "*.lock", "*.gathering")
# Lists, for a run or a sweep and its trials: complete checkpoints, results with their modification times, and recent
# heartbeats with theirs. The number of processes does not depend on the number of trials.
_LISTED = """\
cd {directory} 2>/dev/null || exit 0
echo "now $(date +%s)"
[ -f study.journal ] && echo sweep
for place in checkpoints/step-* */checkpoints/step-*; do [ -f "$place/manifest.json" ] && echo "step - $place"; done
find . -maxdepth 2 -name result.json -printf 'result %T@ %P\\n'
find . -maxdepth 2 -name .heartbeat -mmin -5 -printf 'beat %T@ %P\\n'
"""


class Copies:
    """Copies one run or one sweep.

    Args:
        shell: the shell of the head.
        directory: the run's directory on the head.
    """

    def __init__(self, shell: Shell, directory: str, run: RunDirectory) -> None:
        self._shell, self._directory, self._run = shell, directory, run
        self._results: dict[str, str] = {}  # path -> modification time of the copied result
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._copy_regularly, name="launch-copies", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, last: bool = True) -> None:
        """Stop copying. last: copy once more, and raise HostError if that fails."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        if last:
            self.fetch()

    def try_fetch(self) -> None:
        """Call `fetch`, and ignore errors: the next call may succeed."""
        with suppress(HostError, OSError):
            self.fetch()

    def _copy_regularly(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self.try_fetch()

    def fetch(self) -> None:
        """Copy the files that have changed. A checkpoint is copied when it is complete, and appears here as a whole.

        Raises:
            HostError: the head is unreachable.
        """
        with self._lock:
            listed = self._shell.run(_LISTED.format(directory=shlex.quote(self._directory)), what="listing files")
            lines = listed.splitlines()
            if not lines:
                return  # the directory does not exist yet
            now, sweep = int(lines[0].split()[1]), "sweep" in lines[:2]
            excluded = [*_EXCLUDED, *(f"/*/{name}" for name in _OF_A_RUN if sweep)]
            self._copy(f"{self._directory}/", self._run.path, [f"--exclude={pattern}" for pattern in excluded])
            beats, results, steps = (_facts(lines, kind, sweep) for kind in ("beat", "result", "step"))
            for place, when in beats.items():
                self._beat(place, now - float(when))
            self._copy_results(results)
            self._checkpoints({Path(place) for place in steps}, ("", "*/") if sweep else ("",))

    def _copy(self, remote: str, local: Path, options: Sequence[str] = ()) -> bool:
        """Copy files, and return whether all were copied: files that are deleted at the same time are not."""
        try:
            self._shell.fetch(remote, local, options, seconds=_LONGEST_SECONDS)
        except HostError as error:
            if error.cause != "failed":
                raise
            return False
        return True

    def _beat(self, place: str, age: float) -> None:
        """Write a heartbeat with the age of the remote one, by the clock of the head. Its process is on the head."""
        with suppress(OSError):
            path = self._run.path / place
            write_json(path, {"host": "", "pid": 0})
            when = time.time() - max(0.0, age)
            os.utime(path, (when, when))

    def _copy_results(self, remote: dict[str, str]) -> None:
        """Copy the results that have changed, and replace the remote paths of their checkpoints by local ones."""
        changed = [place for place, when in remote.items() if self._results.get(place) != when]
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
                checkpoint = str(result.get("checkpoint") or "")
                if checkpoint and not checkpoint.startswith(str(run.path)):
                    result["checkpoint"] = str(run.checkpoints / Path(checkpoint).name)
                    run.write_result(result)
            self._results[place] = remote[place]

    def _checkpoints(self, remote: set[Path], runs: Sequence[str]) -> None:
        """Copy new checkpoints, the newest first, and remove those that the run has removed."""
        top = self._run.path
        local = {path.relative_to(top) for run in runs for path in top.glob(f"{run}checkpoints/step-*")}
        for place in sorted(remote - local, key=lambda place: place.name, reverse=True):
            part = top / place.parent / f".{place.name}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            if self._copy(f"{self._directory}/{place}/", part) and (part / "manifest.json").is_file():
                with suppress(OSError):  # another command has copied it at the same time
                    os.replace(part, top / place)
            shutil.rmtree(part, ignore_errors=True)
        if remote:
            for place in local - remote:
                shutil.rmtree(top / place, ignore_errors=True)


def _facts(lines: Sequence[str], kind: str, sweep: bool) -> dict[str, str]:
    """Return path -> time of the listed files of a kind. In a run, folders may be the user's; in a sweep, trials."""
    found = {}
    for line in lines:
        if line.startswith(f"{kind} "):
            _, when, place = line.split(" ", 2)
            if sweep or place.count("/") == (kind == "step"):
                found[place] = when
    return found


def upload(shell: Shell, directory: str, run: RunDirectory) -> None:
    """Copy a run that is resumed to the head, unless the head has the run with as many steps.

    Raises:
        HostError: the head is unreachable, or has no space.
    """
    result = shell.run(f"cat {shlex.quote(directory)}/result.json 2>/dev/null || true", what="reading the run's result")
    with suppress(ValueError, TypeError):
        if json.loads(result)["steps"] >= (run.result().get("steps") or 0):
            return
    shell.send(run.path, None, directory, seconds=_LONGEST_SECONDS)
