"""`launch logs` and `launch stop` of a remote run."""

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
    """Return whether the run's cluster was removed."""
    return place.head is not None and place.head not in [head.name for head in registry.all_heads()]


@contextmanager
def copied(run: RunDirectory, note: Callable[[str], None] | None = None, first: bool = True) -> Iterator[Copies | None]:
    """Copy the files of a remote run to this machine during the block, and at its end.

    Args:
        note: called with a line if the cluster was removed, so that nothing can be copied.
        first: copy at the beginning as well.

    Yields:
        The copier; None if this machine sees the run's directory, or if the cluster was removed.

    Raises:
        ClusterError: the head is unreachable, or the cluster was removed before anything was copied.
    """
    place = required_location(run)
    if place.head is None or place.directory is None:
        yield None
        return
    if _is_gone(place):
        if not run.log.exists():
            raise ClusterError(
                f'The run "{run.name}" was submitted to the cluster {place.head}, which was removed (launch down) '
                "before any file of the run was copied to this machine. Start the run again with another run.name."
            )
        if note is not None:
            note(f"The cluster {place.head} was removed. These are the files that were copied before.")
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


def fetch_files(run: RunDirectory) -> None:
    """Copy the files of a remote run to this machine once. Raises LaunchError if its head is unreachable."""
    place = required_location(run)
    if place.head is not None and place.directory is not None:
        Copies(registry.load(place.head).shell(), place.directory, run).fetch()


def until_it_begins(
    run: RunDirectory, on_event: Callable[[Event], None], copies: Copies | None, still: Waiting
) -> None:
    """Follow a remote run until the first lines of its log exist on this machine.

    Args:
        still: reports what the command waits for.

    Raises:
        LaunchError: the error that ended the run before that. Its name can then be used again.
    """
    if run.log.exists() or run.status() in FINAL:
        return
    if not still() and still.word == states.LOST:
        return
    _follow_to_start(run, on_event)
    if copies is not None and not run.log.exists():
        on_event({"kind": "note", "text": f"Waiting for the first line of {run.name}/log.txt."})
    while copies is not None and not run.log.exists():
        active = still()  # before copying, so that the last lines are copied as well
        copies.fetch()
        if not active:
            return
        time.sleep(0.3)


def _follow_to_start(run: RunDirectory, on_event: Callable[[Event], None]) -> None:
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
    """Request a checkpoint and the end of a run, wait for it, and return a line that describes the result.

    Raises:
        RunError: the run is not running, or did not stop within ten minutes.
        ClusterError: the cluster is unreachable.
    """
    place = required_location(run)
    if _is_gone(place):
        over = run.status() in FINAL
        why = f"it is {run.status()}" if over else f"its cluster {place.head} was removed (launch down)"
        raise RunError(f'The run "{run.name}" is not running: {why}.')
    state = states.state_of(run)
    if state is not None and state.word == states.LOST:
        with suppress(LaunchError):
            fetch_files(run)
        raise RunError(f'The run "{run.name}" is lost. {state.reason}')
    with copied(run, first=False):  # copying must not delay the request
        _stop(run, place)
    if not run.exists():
        return f"{run.name} was stopped before it started."
    status = run.status()
    return f"{run.name} is {status if status in FINAL else 'stopped'} at step {run.result().get('steps')}."


def stop_trial(run: RunDirectory, sweep: RunDirectory, stop_local: Callable[[RunDirectory], str]) -> str:
    """Request a checkpoint and the end of one trial of a remote sweep; as `stop`.

    Args:
        stop_local: stops a run with a directory that this machine and the cluster share.

    Raises:
        RunError: the trial is not running, or did not stop within ten minutes.
        ClusterError: the cluster is unreachable.
    """
    place = required_location(sweep)
    if place.head is None or place.directory is None:  # this machine sees its directory
        return stop_local(run)
    with copied(sweep) as copies:
        if copies is None or run.status() in FINAL:
            raise RunError(f'The run "{run.name}" is not running: it is {run.status()}.')
        directory = shlex.quote(f"{place.directory}/{run.name}")
        script = f"cd {directory} && touch .stop && mkdir -p .requests && echo stop > .requests/stop"
        registry.load(place.head).shell().run(script, what="requesting the end of the trial")
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
                    f'The run "{run.name}" is not running: it is {run.status()}, and its job on {place.where} is over.'
                )
            jobs.stop(place.job)
            deadline = time.monotonic() + _STOP_SECONDS
            while (status := jobs.status(place.job)) not in (*OVER, "GONE"):
                if time.monotonic() > deadline:
                    raise RunError(
                        f'The run "{run.name}" did not stop within {_STOP_SECONDS:.0f} s; it may be in a long step. '
                        f"The request remains. Follow the run with: launch logs {run.name}."
                    )
                time.sleep(0.3)
        except Unreachable as problem:
            raise ClusterError(
                f"{place.where} does not answer: {problem} The run continues there. Repeat the command "
                "when the cluster is reachable."
            ) from None
