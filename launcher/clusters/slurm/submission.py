"""Submits the job of a run, follows it, and removes it from the queue.

The files of a job are in a private directory of the home, which login node and nodes share:

    job.json                       number of the job
    output.txt                     what the driver prints
    <job>.<restart>/status.json    exit status of the run; further files are those of the tasks (`node`)
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.clusters.slurm.scheduler import QueueState, Scheduler
from launcher.clusters.slurm.script import OUTPUT, SlurmJob, folder_of_run
from launcher.errors import ClusterError, MachineError, RunError, TrainingError
from launcher.formatting import count, detached
from launcher.runs import RunDirectory, user_state

JOB, STATUS = "job.json", "status.json"
INTERRUPT = "USR2"  # the signal with which a task stops the run as after Ctrl-C
_LOOK_SECONDS = 0.3  # between two looks at the files
_QUERY_SECONDS = 4.0  # between two queries of the controller, which serves all users
_UNREACHABLE_SECONDS = 600.0
_SETTLE_SECONDS = 15.0  # for files to arrive over the network after the end of a job
_STOP_SECONDS = 600.0


def submit(request: SlurmJob, report: Callable[[str], None]) -> Callable[[], int]:
    """Submit a job; see `SlurmJob.submit`."""
    scheduler, script, folder = Scheduler(), request.text(), request.folder
    scheduler.check(script, request.cluster, request.options())
    if (before := _job_of(folder)) is not None:
        state = scheduler.state(before)
        if state is not None and not state.is_over:
            raise RunError(
                f'The run "{request.run}" has a Slurm job already: {before}, {state.word}. Follow it with: launch logs '
                f"{request.run}; stop it with: launch stop {request.run}."
            )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        user_state.write_private(folder / "script.sh", script)
        job = scheduler.submit(script, request.cluster, request.options())
        user_state.write_private(folder / JOB, json.dumps({"job": job, "directory": request.directory}) + "\n")
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}), but it holds the files of the Slurm job. Make it "
            "writable, or set XDG_STATE_HOME to a directory that the nodes see."
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    report(f"{request.run}: Slurm job {job}, {count(request.cluster.nodes, 'node')}")
    return lambda: _after_submit(request, job, report)


def _after_submit(request: SlurmJob, job: str, report: Callable[[str], None]) -> int:
    if request.cluster.detach:
        report(detached(request.run))
        return 0
    with _interrupts() as received:
        return Follower(request.folder, job, request.run, report).to_the_end(received)


class Follower:
    """Follows one job.

    Args:
        folder: the directory for the files of the job.
        job: the number of the job.
        name: the name of the run.
        report: called with each line: changes of the state, and what the driver prints.
    """

    def __init__(self, folder: Path, job: str, name: str, report: Callable[[str], None]) -> None:
        self._folder, self._job, self._name, self._report = folder, job, name, report
        self._scheduler = Scheduler()
        self._position, self._partial = 0, b""
        self._state: QueueState | None = QueueState("PENDING")
        self._reported: tuple[str, str] | None = None
        self._queried, self._answered = 0.0, time.monotonic()

    def to_the_end(self, received: list[int]) -> int:
        """Follow the job to its end, and return the exit status of the run.

        Args:
            received: the signals that this command has received; grows. The first stops the run, the second ends the
                job at once.

        Raises:
            TrainingError: the job has ended without an exit status of the run.
            MachineError: Slurm did not answer for minutes.
        """
        handled = 0
        over_since: float | None = None
        while True:
            if len(received) > handled:
                handled = len(received)
                if handled > 1 or self._is_waiting():
                    self._scheduler.cancel(self._job)
                    self._report(f"{self._name}: Slurm job {self._job} is cancelled")
                    return 128 + received[0]
                self._report("Stopping: the run saves a checkpoint first. A second signal stops it at once.")
                self._scheduler.signal(self._job, INTERRUPT)
            self.print_output()
            queried = self._query()
            if queried and handled and self._state is not None and not self._state.is_over:
                self._scheduler.signal(self._job, INTERRUPT)  # the first may have come before the task accepted it
            if self._state is None or self._state.is_over:
                over_since = over_since or time.monotonic()
                status = exit_status(self._folder)
                if status is not None:
                    self.print_output()
                    return 128 + received[0] if received and status in (130, 143) else status
                if time.monotonic() - over_since > _SETTLE_SECONDS:
                    return self._without_status(received)
            else:
                over_since = None
            time.sleep(_LOOK_SECONDS)

    def until_it_trains(self, run: RunDirectory) -> None:
        """Follow the job until the run trains, or the job is over."""
        while run.status() != "running" and self._state is not None and not self._state.is_over:
            time.sleep(_LOOK_SECONDS)
            self._query()
        if not run.exists():
            self.print_output()

    def print_output(self) -> None:
        """Report the lines that the driver has printed since the last call."""
        with suppress(FileNotFoundError), (self._folder / OUTPUT).open("rb") as file:
            file.seek(self._position)
            content = self._partial + file.read()
            self._position = file.tell()
            *lines, self._partial = content.split(b"\n")
            for line in lines:
                self._report(line.decode(errors="replace").rstrip("\r"))

    def _is_waiting(self) -> bool:
        state = self._scheduler.state(self._job)
        return state is not None and state.is_waiting

    def _query(self) -> bool:
        """Query the state if it is due, and report a change. Return whether it was queried."""
        now = time.monotonic()
        ended = exit_status(self._folder) is not None
        if now - self._queried < (min(1.0, _QUERY_SECONDS) if ended else _QUERY_SECONDS):
            return False
        self._queried = now
        try:
            self._state = self._scheduler.state(self._job)
            self._answered = now
        except ClusterError as error:
            if now - self._answered > _UNREACHABLE_SECONDS:
                raise MachineError(f"{error} The job may still run: squeue --jobs={self._job}.") from None
            return False
        if self._state is None or self._state.is_over:
            return True
        reason = self._state.reason if self._state.is_waiting else ""
        shown = (self._state.word, reason)
        if shown != self._reported and self._state.word != "COMPLETING":
            self._report(f"{self._name} is {self._state.word.lower()}{f' ({reason})' if reason else ''} in Slurm")
            self._reported = shown
        return True

    def _without_status(self, received: list[int]) -> int:
        self.print_output()
        if received:
            return 128 + received[0]
        state = self._state or QueueState("unknown", "Slurm does not list it any more")
        raise TrainingError(
            f"The Slurm job {self._job} has ended without a result of its run: {state.explain()}. Continue the run "
            f"with run.name={self._name} run.resume=auto. The output of the job is {self._folder / OUTPUT}."
        )


class WaitingJob:
    """A run that waits in the queue of Slurm, or whose job is starting."""

    def __init__(self, run: RunDirectory, job: str, state: QueueState) -> None:
        self._run, self._job, self._state = run, job, state

    def await_start(self, report: Callable[[str], None]) -> None:
        Follower(folder_of_run(self._run), self._job, self._run.name, report).until_it_trains(self._run)

    def cancel(self) -> str:
        """Remove the job from the queue; if it starts, stop its run.

        Raises:
            RunError: the run did not stop within ten minutes.
        """
        scheduler, name = Scheduler(), self._run.name
        if self._state.is_waiting:
            scheduler.cancel(self._job)
            return f"{name} was removed from the queue of Slurm (job {self._job})."
        latest = time.monotonic() + _STOP_SECONDS
        while (state := scheduler.state(self._job)) is not None and not state.is_over:
            if time.monotonic() > latest:
                raise RunError(f"{name} did not stop within {_STOP_SECONDS:.0f} s. End it with: scancel {self._job}.")
            scheduler.signal(self._job, INTERRUPT)
            time.sleep(1.0)
        return f"{name} was stopped (Slurm job {self._job})."


def waiting(run: RunDirectory) -> WaitingJob | None:
    """Return a run whose job waits in the queue or is starting; None if there is no such job."""
    folder = folder_of_run(run)
    if (job := _job_of(folder)) is None:
        return None
    state = Scheduler().state(job)
    if state is None or state.is_over or (not state.is_waiting and run.exists() and run.status() == "running"):
        return None
    return WaitingJob(run, job, state)


def exit_status(folder: Path) -> int | None:
    """Return the exit status of the run in the last start of its job; None if it has not ended."""
    starts = [path for path in folder.glob("*.*") if path.suffix[1:].isdigit()]
    last = max(starts, key=lambda path: int(path.suffix[1:]), default=folder)
    status = _read(last / STATUS).get("exit")
    return status if isinstance(status, int) else None


def _job_of(folder: Path) -> str | None:
    job = _read(folder / JOB).get("job")
    return job if isinstance(job, str) and job.isdigit() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM within the block, instead of ending the command."""
    received: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
