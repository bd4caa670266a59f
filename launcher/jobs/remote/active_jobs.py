"""Finds the active runs of a cluster that is about to be removed, and saves them on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.clusters.remote.ray_jobs import Unreachable
from launcher.clusters.remote.registry import Head
from launcher.errors import LaunchError, RunError
from launcher.jobs.remote import control
from launcher.jobs.remote.connection import through
from launcher.jobs.remote.states import PATIENCE_SECONDS
from launcher.runs import FINAL, RunDirectory, user_state

EXIT_SECONDS = 20.0  # the time in which the driver of a run that has ended exits
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class JobAtWork:
    """A job that has not ended, and its run; None if the records of this user on this machine do not have it."""

    job: str
    run: RunDirectory | None

    @property
    def name(self) -> str:
        return f'"{self.run.name}"' if self.run is not None else f"a run from another machine (job {self.job})"


def jobs_at_work(head: Head) -> list[JobAtWork]:
    """Return the jobs that have not ended. If the cluster does not answer, the list is empty: no run can be saved."""
    found: list[str] = []

    def ask() -> None:
        with suppress(LaunchError, Unreachable), through(head) as jobs:
            found.extend(jobs.unfinished())

    asking = threading.Thread(target=ask, name="launch-at-work", daemon=True)
    asking.start()
    asking.join(PATIENCE_SECONDS)
    known = {
        str(record.place.get("job")): RunDirectory(Path(record.run))
        for record in user_state.records()
        if record.place is not None and record.place.get("head") == head.name
    }
    return [JobAtWork(job, known.get(job)) for job in [*found]]


def release(head: Head, report: Callable[[str], None], save: bool) -> None:
    """Make sure that the removal of a cluster kills no run.

    Args:
        report: called with lines for the user.
        save: stop the active runs with a checkpoint, and copy them to this machine.

    Raises:
        RunError: a run is active, and `save` is false or the run was submitted from another machine.
        ClusterError: the connection was lost.
    """
    found = jobs_at_work(head)
    latest = time.monotonic() + EXIT_SECONDS
    # The command that follows a run returns before its driver has exited.
    while any(one.run is not None and one.run.status() in FINAL for one in found) and time.monotonic() < latest:
        time.sleep(_POLL_SECONDS)
        found = jobs_at_work(head)
    if save:
        for one in found:
            if one.run is not None:
                report(f"Saving {one.name} and copying it to {one.run.path}.")
                report(control.stop(one.run))
        found = [one for one in found if one.run is None]
    if found:
        raise RunError(_refused(head.name, found))


def _refused(cluster: str, found: Sequence[JobAtWork]) -> str:
    named = [one for one in found if one.run is not None]
    names = ", ".join(one.name for one in found)
    verb = "is" if len(found) == 1 else "are"
    save = f"launch down {cluster} --save saves a checkpoint, copies the run here and then removes the cluster; "
    return (
        f"{names[0].upper()}{names[1:]} {verb} active on {cluster}, and launch down would kill the runs. "
        f"{save if named else 'Stop the run on the machine that submitted it; '}"
        f"launch down {cluster} --force removes the cluster at once."
    )
