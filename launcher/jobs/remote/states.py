"""The states of remote runs, as their clusters report them.

queued        Ray has not started the run's driver
starting      the driver is running, and no step is complete
working       steps are complete; the files on this machine may be old
lost          no process of the run is left, and it has no result
unreachable   the cluster does not answer
completed, failed, …   the run has ended: the status in its result.json on the cluster
"""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.clusters.remote import registry
from launcher.clusters.remote.ray_jobs import OVER, Unreachable
from launcher.clusters.remote.registry import Head
from launcher.errors import LaunchError, RunError
from launcher.jobs.remote.connection import connected, through
from launcher.jobs.remote.location import RunLocation, location_of
from launcher.runs import FINAL, RunDirectory

QUEUED, STARTING, WORKING, LOST, UNREACHABLE = "queued", "starting", "working", "lost", "unreachable"
ACTIVE = (QUEUED, STARTING, WORKING)
PATIENCE_SECONDS = 8.0
ASK_SECONDS = 5.0  # between two requests of `Waiting`
_MARK = "@@ launch @@"  # it cannot be a line of a JSON file
_ENDED_AS = {"FAILED": "failed", "STOPPED": "stopped"}


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        word: one of the states above.
        reason: a sentence with the cause, and a remedy if there is one.
        result: the content of result.json on the cluster; empty if there is none.
    """

    word: str
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


def state_of(run: RunDirectory) -> RunState | None:
    """Return the state of a remote run; None if this user's record does not confirm its location."""
    return states_of([run]).get(run.path)


def states_of(runs: Sequence[RunDirectory], patience: float = PATIENCE_SECONDS) -> dict[Path, RunState]:
    """Ask all clusters in parallel, and return the states of their runs by directory.

    Args:
        patience: seconds after which a cluster without an answer is unreachable.
    """
    by_cluster: dict[str, list[tuple[RunDirectory, RunLocation]]] = {}
    for run in runs:
        if (place := location_of(run)) is not None:
            by_cluster.setdefault(place.where, []).append((run, place))
    found: dict[Path, RunState] = {}

    def ask(sent: list[tuple[RunDirectory, RunLocation]]) -> None:
        found.update(_of_head(sent) if sent[0][1].head is not None else _of_address(sent))

    threads = [threading.Thread(target=ask, args=(sent,), daemon=True) for sent in by_cluster.values()]
    for thread in threads:
        thread.start()
    latest = time.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, latest - time.monotonic()))
    answered = dict(found)
    for where, sent in by_cluster.items():
        for run, _ in sent:
            silent = RunState(UNREACHABLE, f"{where} did not answer within {patience:g} s.")
            answered.setdefault(run.path, silent)
    return answered


def _of_address(sent: Sequence[tuple[RunDirectory, RunLocation]]) -> dict[Path, RunState]:
    found = {}
    for run, place in sent:
        try:
            with connected(run) as jobs:
                found[run.path] = _state(run, place, jobs.status(place.job), _result_here(run))
        except (LaunchError, Unreachable) as problem:
            found[run.path] = RunState(UNREACHABLE, str(problem))
    return found


def _of_head(sent: Sequence[tuple[RunDirectory, RunLocation]]) -> dict[Path, RunState]:
    where = sent[0][1].where
    if where not in [head.name for head in registry.all_heads()]:
        return {run.path: _lost(run, f"Its cluster {where} was removed.", _result_here(run)) for run, _ in sent}
    head = registry.load(where)
    found = {}
    try:
        results, has_ray = _look(head, [place.directory for _, place in sent])
        if not has_ray:
            why = f"Ray is no longer running on {where}."
            return {run.path: _lost(run, why, result) for (run, _), result in zip(sent, results, strict=True)}
        with through(head) as jobs:
            for (run, place), result in zip(sent, results, strict=True):
                known = result if place.directory is not None else _result_here(run)
                found[run.path] = _state(run, place, jobs.status(place.job), known)
    except (LaunchError, Unreachable) as problem:
        return {run.path: found.get(run.path, RunState(UNREACHABLE, str(problem))) for run, _ in sent}
    return found


def _look(head: Head, directories: Sequence[str | None]) -> tuple[list[dict[str, Any]], bool]:
    """Return the results in directories of a head, and whether Ray is running there. Raises HostError."""
    probe = f"import socket; socket.create_connection(('127.0.0.1', {head.dashboard}), 3)"
    script = [f"{shlex.quote(head.python)} -c {shlex.quote(probe)} 2>/dev/null && echo yes"]
    for directory in directories:
        place = shlex.quote(f"{directory or '/nonexistent'}/result.json")
        script.append(f"echo; echo {shlex.quote(_MARK)}; cat {place} 2>/dev/null")
    shown = head.shell().run("\n".join([*script, "true"]), what="reading the results of runs", seconds=PATIENCE_SECONDS)
    ray, *texts = shown.split(f"\n{_MARK}\n")
    return [_parsed(text) for text in texts], "yes" in ray


def _parsed(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
        return content if isinstance(content, dict) else {}
    return {}


def _result_here(run: RunDirectory) -> dict[str, Any]:
    try:
        return run.result()
    except RunError:
        return {}


def _state(run: RunDirectory, place: RunLocation, job: str, result: Mapping[str, Any]) -> RunState:
    """Return the state of a run from the status of its job and its result.json."""
    where, status = place.where, result.get("status")
    if status in FINAL:
        return RunState(str(status), "", result)
    if job == "PENDING":
        return RunState(QUEUED, f"Ray on {where} has not started its driver yet.", result)
    if job not in (*OVER, "GONE"):
        if not result or result.get("steps") == 0:
            return RunState(STARTING, f"Its driver is running on {where} and has not completed a step.", result)
        return RunState(WORKING, f"Its driver is running on {where}. The files on this machine may be old.", result)
    if job == "GONE":
        return _lost(run, f"Ray on {where} was restarted and does not know the job {place.job}.", result)
    if not result and job in _ENDED_AS:
        return RunState(_ENDED_AS[job], f"Its driver on {where} ended before the run started.", result)
    return _lost(run, f"Its driver on {where} ended without a result (job {place.job}, {job}).", result)


def _lost(run: RunDirectory, why: str, result: Mapping[str, Any]) -> RunState:
    if result.get("status") in FINAL:
        return RunState(str(result["status"]), "", result)
    steps = result.get("steps") or _result_here(run).get("steps") or 0
    remedy = f"The run ended at step {steps}; continue it with: launch run.name={run.name} run.resume=true."
    if not steps:
        remedy = f"The run had not completed a step; restart it with: launch run.name={run.name} run.resume=auto."
    return RunState(LOST, f"{why} {remedy}", result)


class Waiting:
    """Reports what `launch logs` waits for while the local files of a remote run do not change.

    Args:
        run: the run, or the sweep of a trial.
        note: called with a line when the state has changed.
        seconds: how long to retry an unreachable cluster.
    """

    def __init__(self, run: RunDirectory, note: Callable[[str], None], seconds: float = 900.0) -> None:
        self._run, self._note, self._seconds = run, note, seconds
        self.word = ""
        self._active = True
        self._next = 0.0
        self._answered = time.monotonic()

    def __call__(self) -> bool:
        """Return whether the run may print more. Call it often: it asks the cluster every `ASK_SECONDS`."""
        now = time.monotonic()
        if now < self._next or not self._active:
            return self._active
        state = state_of(self._run) or RunState(UNREACHABLE, "This user has no record of it.")
        self._next = time.monotonic() + ASK_SECONDS
        if state.word != UNREACHABLE:
            self._answered = now
        if state.word != self.word and state.reason:
            self._note(f"{self._run.name} is {state.word}. {state.reason}")
        self.word = state.word
        self._active = state.word in ACTIVE or (state.word == UNREACHABLE and now - self._answered < self._seconds)
        return self._active
