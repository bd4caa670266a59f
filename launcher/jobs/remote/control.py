"""`launch logs` and `stop` of a run that was sent to a cluster."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from launcher.clusters.remote import registry
from launcher.clusters.remote.ray_jobs import OVER, Unreachable
from launcher.errors import ClusterError, HostError, LaunchError, RunError, from_dict
from launcher.jobs.remote import follow, states
from launcher.jobs.remote.connection import connected
from launcher.jobs.remote.copies import Copies
from launcher.jobs.remote.location import RunLocation, forget, required_location
from launcher.jobs.remote.states import Waiting
from launcher.jobs.remote.wire import Event
from launcher.runs import FINAL, RunDirectory

_STOP_SECONDS = 600.0


def _is_gone(place: RunLocation) -> bool:
    """Whether its cluster is down, or forgotten."""
    return place.head is not None and place.head not in [head.name for head in registry.all_heads()]


@contextmanager
def copied(run: RunDirectory, note: Callable[[str], None] | None = None, first: bool = True) -> Iterator[Copies | None]:
    """Have the files of a run that is driven elsewhere be copied to here meanwhile, and at the end.

    Args:
        note: is told where that cannot be, since its cluster is down.
        first: at the beginning as well.

    Yields:
        What copies; None where nothing has to be, or nothing can be.

    Raises:
        ClusterError: its head cannot be reached, or is gone before anything was copied.
    """
    place = required_location(run)
    if place.head is None or place.directory is None:
        yield None
        return
    if _is_gone(place):
        if not run.log.exists():
            raise ClusterError(
                f'The run "{run.name}" was sent to the cluster {place.head}, which is not known here any more (launch '
                "down), and nothing of the run was copied before. Start it again under another run.name."
            )
        if note is not None:
            note(f"The cluster {place.head} is not known here any more; this is what was copied from it.")
        yield None
        return
    copies = Copies(registry.load(place.head).shell(), place.directory, run)
    if first:
        copies.fetch()
    copies.start()
    try:
        yield copies
    finally:
        with suppress(HostError):
            copies.close()


def bring_here(run: RunDirectory) -> None:
    """Copy what there is of a run that was sent, once. LaunchError where its head cannot be reached, or is gone."""
    place = required_location(run)
    if place.head is not None and place.directory is not None:
        Copies(registry.load(place.head).shell(), place.directory, run).fetch()


def until_it_begins(
    run: RunDirectory, on_event: Callable[[Event], None], copies: Copies | None, still: Waiting
) -> None:
    """Follow a run that was sent until it has written its first lines.

    Args:
        still: says what is waited for.

    Raises:
        LaunchError: what it ended with before that; its name is free again.
    """
    if run.log.exists() or run.status() in FINAL:
        return
    if not still() and still.word == states.LOST:
        return
    _hear_of_it(run, on_event)
    if copies is not None and not run.log.exists():
        on_event({"kind": "note", "text": f"Waiting for the first line of {run.name}/log.txt."})
    while copies is not None and not run.log.exists():
        goes_on = still()  # asked before copying: what is written last still comes
        copies.fetch()
        if not goes_on:
            return
        time.sleep(0.3)


def _hear_of_it(run: RunDirectory, on_event: Callable[[Event], None]) -> None:
    place = required_location(run)
    with connected(run) as jobs:
        for event in follow.events(jobs, place.job, place.where, lambda: None, run.name):
            if event["kind"] == "end" and "error" in event:
                if not run.exists():
                    forget(run, [run.path])
                raise from_dict(event["error"])
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
    place = required_location(run)
    if _is_gone(place):
        over = run.status() in FINAL
        why = f"it is {run.status()}" if over else f"its cluster {place.head} is not known here any more (launch down)"
        raise RunError(f'The run "{run.name}" is not running: {why}.')
    state = states.state_of(run)
    if state is not None and state.word == states.LOST:
        with suppress(LaunchError):
            bring_here(run)
        raise RunError(f'The run "{run.name}" is lost. {state.reason}')
    with copied(run, first=False):  # what there is to copy must not delay it
        _stop(run, place)
    if not run.exists():
        return f"{run.name} was stopped before it began."
    status = run.status()
    return f"{run.name} is {status if status in FINAL else 'stopped'} at step {run.result().get('steps')}."


def stop_trial(run: RunDirectory, sweep: RunDirectory, stop_here: Callable[[RunDirectory], str]) -> str:
    """Have one trial of a sweep that was sent save a checkpoint and stop, and wait for it. Returns what came of it.

    Args:
        stop_here: does so with a run whose directory this machine and the cluster share.

    Raises:
        RunError: it does not go on, or did not stop in ten minutes.
        ClusterError: its cluster cannot be reached.
    """
    place = required_location(sweep)
    if place.head is None or place.directory is None:  # its directory is seen here
        return stop_here(run)
    with copied(sweep) as copies:
        if copies is None or run.status() in FINAL:
            raise RunError(f'The run "{run.name}" is not running: it is {run.status()}.')
        there = shlex.quote(f"{place.directory}/{run.name}")
        asked = f"cd {there} && touch .stop && mkdir -p .requests && touch .requests/stop && echo stop > .requests/stop"
        registry.load(place.head).shell().run(asked, what="asking the trial to stop")
        deadline = time.monotonic() + _STOP_SECONDS
        while run.status() not in FINAL:
            if time.monotonic() > deadline:
                raise RunError(f'The run "{run.name}" did not stop within {_STOP_SECONDS:.0f} s. The request stays.')
            time.sleep(0.5)
    return f"{run.name} is {run.status()} at step {run.result().get('steps')}."


def _stop(run: RunDirectory, place: RunLocation) -> None:
    with connected(run) as jobs:
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
