"""The runs at work on a cluster that is about to be removed."""

from __future__ import annotations

import threading
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
from launcher.runs import RunDirectory, user_state


@dataclass(frozen=True)
class JobAtWork:
    """A job that has not ended, and its run; None where this user's record on this machine does not name it."""

    job: str
    run: RunDirectory | None

    @property
    def name(self) -> str:
        return f'"{self.run.name}"' if self.run is not None else f"a run sent from elsewhere (job {self.job})"


def jobs_at_work(head: Head) -> list[JobAtWork]:
    """Return the jobs that have not ended; none where the cluster does not answer, since then none can be saved."""
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


def release(head: Head, tell: Callable[[str], None], save: bool) -> None:
    """See that the removal of a cluster ends no run.

    Args:
        save: stop the runs at work with a checkpoint, and copy them here.

    Raises:
        RunError: a run is at work, and is not to be saved or cannot be; names it.
        ClusterError: the connection was lost meanwhile.
    """
    found = jobs_at_work(head)
    if save:
        for one in found:
            if one.run is not None:
                tell(f"Saving {one.name} and copying it to {one.run.path}.")
                tell(control.stop(one.run))
        found = [one for one in found if one.run is None]
    if found:
        raise RunError(_refused(head.name, found))


def _refused(cluster: str, found: Sequence[JobAtWork]) -> str:
    named = [one for one in found if one.run is not None]
    names = ", ".join(one.name for one in found)
    verb = "is" if len(found) == 1 else "are"
    save = f"launch down {cluster} --save saves a checkpoint, copies the run here and then removes the cluster; "
    return (
        f"{names[0].upper()}{names[1:]} {verb} at work on {cluster}, which launch down would end. "
        f"{save if named else 'Stop it where it was sent from; '}"
        f"launch down {cluster} --force removes the cluster at once."
    )
