"""`launch logs` and `stop` of a run that was sent to a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from launcher.clusters import heads
from launcher.clusters.ray_jobs import OVER, Unreachable
from launcher.errors import ClusterError, HostError, RunError
from launcher.jobs.remote import follow
from launcher.jobs.remote.caller import error_of
from launcher.jobs.remote.connection import connected
from launcher.jobs.remote.copies import Copies
from launcher.jobs.remote.place import Place, place_of
from launcher.jobs.remote.wire import Event
from launcher.runs import FINAL, RunDirectory

_STOP_SECONDS = 600.0


def _place(run: RunDirectory) -> Place:
    place = place_of(run)
    if place is None:
        raise RunError(f"{run.path / 'remote.json'} is damaged, so that nobody knows where the run is driven.")
    return place


def _is_gone(place: Place) -> bool:
    """Whether its cluster is down, or forgotten."""
    return place.head is not None and place.head not in [head.name for head in heads.all_heads()]


@contextmanager
def copied(run: RunDirectory, note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Have the files of a run that is driven elsewhere be copied to here meanwhile.

    Args:
        note: is told where that cannot be, since its cluster is down.

    Raises:
        ClusterError: its head cannot be reached, or is gone before anything was copied.
    """
    place = _place(run)
    if place.head is None or place.directory is None:
        yield
        return
    if _is_gone(place):
        if not run.log.exists():
            raise ClusterError(
                f'The run "{run.name}" was sent to the cluster {place.head}, which is not known here any more (launch '
                "down), and nothing of the run was copied before. Start it again under another run.name."
            )
        if note is not None:
            note(f"The cluster {place.head} is not known here any more; this is what was copied from it.")
        yield
        return
    copies = Copies(heads.load(place.head).shell(), place.directory, run)
    copies.fetch()
    copies.start()
    try:
        yield
    finally:
        with suppress(HostError):
            copies.close()


def until_it_begins(run: RunDirectory, on_event: Callable[[Event], None]) -> None:
    """Follow a run that was sent until it has written its first lines.

    Raises:
        LaunchError: what it ended with before that.
    """
    if run.log.exists() or run.exists():
        return
    place = _place(run)
    with connected(place) as jobs:
        for event in follow.events(jobs, place.job, place.where, lambda: None, run.name):
            if event["kind"] == "end" and "error" in event:
                raise error_of(event["error"])
            if event["kind"] in ("begun", "end") and (run.exists() or place.directory):
                return
            if event["kind"] != "begun":
                on_event(event)


def stop(run: RunDirectory) -> str:
    """Have a run save a checkpoint and stop, and wait for it. Returns what came of it.

    Raises:
        RunError: it does not go on, or did not stop in ten minutes.
        ClusterError: its cluster cannot be reached.
    """
    place = _place(run)
    if _is_gone(place):
        over = run.status() in FINAL
        why = f"it is {run.status()}" if over else f"its cluster {place.head} is not known here any more (launch down)"
        raise RunError(f'The run "{run.name}" is not running: {why}.')
    with copied(run):
        _stop(run, place)
    if not run.exists():
        return f"{run.name} was stopped before it began."
    status = run.status()
    return f"{run.name} is {status if status in FINAL else 'stopped'} at step {run.result().get('steps')}."


def _stop(run: RunDirectory, place: Place) -> None:
    with connected(place) as jobs:
        try:
            status = jobs.status(place.job)
            if status in (*OVER, "GONE"):
                raise RunError(
                    f'The run "{run.name}" is not running: it is {run.status()}, its job on {place.where} over.'
                )
            jobs.stop(place.job)
            deadline = time.monotonic() + _STOP_SECONDS
            while (status := jobs.status(place.job)) not in (*OVER, "GONE"):
                if time.monotonic() > deadline:
                    raise RunError(
                        f'The run "{run.name}" did not stop within {_STOP_SECONDS:.0f} s; it may be in a long step. '
                        f"The request stays; see: launch logs {run.name}."
                    )
                time.sleep(0.3)
        except Unreachable as problem:
            raise ClusterError(f"{place.where} does not answer: {problem} The run goes on there; try again.") from None
