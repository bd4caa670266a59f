"""The policy of Ray Train's controller: what is retried, with how many workers, and which workers count as alive.

The controller is an actor that may run on a machine without this package. The module is therefore pickled by value (see
`send_with_policy`) and imports nothing of launcher but `free_capacity` and parts of `ray_seam`, which are pickled with
it. The policy sends its decisions to the driver as events, through the run's part of the key-value store
(`launcher.runners.channel`).

    a worker dies, hangs or loses a peer   a new group continues from the newest checkpoint; counted as a failure
    all ranks raise Regroup                the same, not counted: an eviction notice, or a new node
    a worker raises another error          the run fails, since a retry would fail as well
    a machine runs out of memory           the run fails, since a retry would fail as well
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from launcher.ray_seam.kv import get, put
from launcher.ray_seam.private import leaving_nodes
from launcher.ray_seam.train_controller import (
    ControllerError,
    Group,
    PreemptionError,
    WorkerGroupError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
    travel_by_value,
)
from launcher.runners.free_capacity import alive_nodes, free_workers, unreachable, workers_per_node

# Prefixes of a worker's errors: the controller has no access to launch's exception classes.
LOST, REGROUP = "[lost] ", "[regroup] "
ATTEMPT = "LAUNCH_ATTEMPT"  # the environment variable with the number of a worker's group
CAUSE_SECONDS = 3.0  # to wait after the first report of a lost peer: its cause may be reported later
SILENT_SECONDS = 2.0  # without an answer, after which a worker may be the cause of errors of other workers
# Without an answer of an unreachable machine, after which its workers have failed. TCP survives shorter interruptions.
UNREACHABLE_SECONDS = 6.0
CACHE_SECONDS = 4.0  # for which the list of unreachable nodes is valid: a check is slow
GROW_SECONDS = 10.0  # between two checks for free resources
START_SECONDS = 10.0  # for a reservation; then the nodes are checked again, since one may have been lost
RELEASE_SECONDS = 3.0  # that Ray needs at most to release the resources of a group


@dataclass
class Rules:
    """The settings of a `RunPolicy`.

    Args:
        run: the key of the run in the key-value store.
        workers: the largest number of workers.
        min_workers: the smallest number of workers.
        share: the resources of one worker.
        max_failures: consecutive restarts without a newer checkpoint; after one more failure the run fails.
        timeout: seconds without an answer after which a worker has failed.
        lean: an embedded Ray, without an autoscaler.
        first_seconds: how long the first group waits for free resources.
        later_seconds: how long later groups wait: a lost machine may be replaced by a new one.
    """

    run: str
    workers: int
    min_workers: int
    share: dict[str, float]
    max_failures: int = 0
    timeout: float = 120.0
    lean: bool = True
    first_seconds: float = 60.0
    later_seconds: float = 600.0


@dataclass
class Ledger:
    """The state of a `RunPolicy`."""

    rules: Rules
    attempt: int = 0
    cause: str = ""
    failures: int = 0  # consecutive
    resumed: int = -1  # the step at which the attempt of the last failure had started
    resizing: bool = False
    held: list[str] = field(default_factory=list)  # the node of each worker of the last group
    checked: float = 0.0  # the time of the last check for free resources
    waiting_since: float | None = None  # the time since when a group waits for free resources
    suspects: dict[int, str] = field(default_factory=dict)
    sent: int = 0
    _gone: tuple[float, frozenset[str]] = (float("-inf"), frozenset())  # time and result of the last check

    def gone(self) -> frozenset[str]:
        """Return the ids of the nodes that Ray treats as alive and that do not answer."""
        if time.monotonic() - self._gone[0] > CACHE_SECONDS:
            self._gone = (time.monotonic(), frozenset(unreachable(alive_nodes())))
        return self._gone[1]

    def read(self, key: str) -> str | None:
        return get(f"{self.rules.run}/{key}")

    def write(self, key: str, value: str) -> None:
        put(f"{self.rules.run}/{key}", value)

    def send(self, **event: Any) -> None:
        """Send an event to the driver."""
        self.write(f"event/{self.attempt:06d}/controller/{self.sent:09d}", json.dumps([event]))
        self.sent += 1

    def begin_attempt(self) -> None:
        # From the store, since an earlier controller of the run may have died.
        self.attempt = int(self.read("attempt") or 0) + 1
        self.cause = self.read("cause") or ""
        self.write("attempt", str(self.attempt))
        self.write("cause", "")
        self.suspects, self.resizing, self.checked = {}, False, time.monotonic()

    def may_wait(self) -> bool:
        """Return whether a group may wait longer for free resources."""
        seconds = self.rules.later_seconds if self.attempt else self.rules.first_seconds
        if self.waiting_since is None:
            self.waiting_since = time.monotonic()
            self.send(kind="waiting", seconds=seconds)
        return time.monotonic() - self.waiting_since < seconds

    def count_failure(self) -> bool:
        """Count a failure, and return whether the run must fail."""
        resumed = int(self.read("resumed") or 0)
        self.failures = 1 if resumed > self.resumed else self.failures + 1
        self.resumed = resumed
        return self.failures > self.rules.max_failures


# ---- retries --------------------------------------------------------------------------------------------------------


def kind_of(error: Exception) -> str:
    """Return the kind of a worker's failure: "dead", "preempted", "silent", "lost", "regroup" or "final"."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return "preempted" if getattr(error.health_check_failure, "preempted", False) else "dead"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "silent"
    text = str(error)
    return "lost" if LOST in text else "regroup" if REGROUP in text else "final"


def suspects(failures: dict[int, Exception]) -> dict[int, str]:
    """Return the ranks that caused the failures, with the kind: "dead", "preempted", "memory" or "silent"."""
    found = {}
    for rank, error in failures.items():
        kind = kind_of(error)
        if kind in ("dead", "preempted", "silent"):
            memory = kind == "dead" and ("OutOfMemoryError" in str(error) or "low on memory" in str(error))
            found[rank] = "memory" if memory else kind
    return found


# ---- group sizes ----------------------------------------------------------------------------------------------------


def holds_less(found: dict[str, int], held: list[str]) -> bool:
    """Return whether a node has resources for fewer workers than it had. Nodes that are not in `found` are ignored."""
    return any(node in found and found[node] < count for node, count in Counter(held).items())


# ---- the policy -----------------------------------------------------------------------------------------------------


class RunPolicy:
    """The policy of one run's controller. `launcher.ray_seam.train_controller.Policy` describes its methods."""

    def __init__(self, rules: Rules) -> None:
        self._ledger = Ledger(rules)
        self._unreachable: set[str] = set()  # nodes, at the last check
        self.lean, self.workers, self.share = rules.lean, rules.workers, rules.share
        self.health_seconds, self.start_seconds = rules.timeout, START_SECONDS

    # Retries.

    def retry(self, error: Exception) -> bool:
        cause = self._cause(error)
        ledger = self._ledger
        again = cause is not None and not (cause == "failure" and ledger.count_failure())
        waits = cause == "no_capacity"
        if not waits:
            ledger.send(
                kind="verdict",
                again=again,
                cause=cause,
                attempt=ledger.attempt,
                suspects=ledger.suspects,
                count=ledger.failures,
                most=ledger.rules.max_failures,
            )
        ledger.write("cause", ledger.cause if waits else cause or "")
        return again

    def _cause(self, error: Any) -> str | None:
        """Return the cause for which a new group is started; None if the run must fail."""
        ledger = self._ledger
        if isinstance(error, PreemptionError):
            return "preemption"
        if isinstance(error, ControllerError):
            failure = error.controller_failure
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                return "no_capacity" if ledger.may_wait() else None
            passing = (WorkerGroupStartupFailedError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)
            return "failure" if isinstance(failure, passing) and ledger.attempt > 0 else None
        if not isinstance(error, WorkerGroupError):
            return None
        failures = error.worker_failures
        ledger.suspects = suspects(failures) or ledger.suspects
        if any(how == "memory" for how in ledger.suspects.values()):
            return None
        kinds = {kind_of(failure) for failure in failures.values()}
        if "final" in kinds:
            return None
        if kinds == {"regroup"}:
            return "resize" if ledger.resizing else "preemption"
        return "preemption" if "preempted" in kinds else "failure"

    # Group sizes and nodes.

    def new_size(self) -> int | None:
        ledger, rules = self._ledger, self._ledger.rules
        if rules.min_workers >= rules.workers:
            return rules.workers
        count = min(rules.workers, self._settled_capacity())
        if count >= rules.min_workers:
            return count
        if not ledger.may_wait():
            raise WorkerGroupStartupTimeoutError(rules.min_workers)
        return None

    def _settled_capacity(self) -> int:
        """Return how many workers fit into the free resources, after Ray has released those of the last group."""
        ledger = self._ledger
        gone = ledger.gone()
        end = time.monotonic() + RELEASE_SECONDS
        # For each node: the resources of a new node do not replace those that the group held on another.
        while holds_less(found := workers_per_node(ledger.rules.share, gone), ledger.held) and time.monotonic() < end:
            time.sleep(0.1)
        return sum(found.values())

    def observe(self, size: int) -> None:
        """Request the restart of a group that could be larger. `new_size` then returns the larger size."""
        ledger = self._ledger
        small = size < ledger.rules.workers
        if small and not ledger.resizing and time.monotonic() - ledger.checked > GROW_SECONDS:
            ledger.checked = time.monotonic()
            if free_workers(ledger.rules.share, set()) >= 1 and free_workers(ledger.rules.share, ledger.gone()) >= 1:
                ledger.resizing = True
                ledger.send(kind="can_grow", attempt=ledger.attempt)

    def waiting(self) -> bool:
        return self._ledger.waiting_since is not None

    def avoided_nodes(self) -> frozenset[str]:
        return self._ledger.gone()

    def group_begins(self) -> None:
        self._ledger.begin_attempt()

    def worker_environment(self) -> dict[str, str]:
        return {ATTEMPT: json.dumps({"attempt": self._ledger.attempt, "cause": self._ledger.cause})}

    def group_reserved(self, placement_group: str) -> None:
        self._ledger.write("placement_group", placement_group)

    def group_started(self) -> None:
        self._ledger.waiting_since = None

    def group_ends(self, nodes: list[str]) -> None:
        self._ledger.held = nodes

    # Health.

    async def examine(self, group: Group, poll: Callable[[], Awaitable[Any]]) -> Any:
        """Return the workers' status. If workers have lost a peer, wait for the cause, which may be reported later.

        If workers regroup, wait until all have saved.
        """
        status = await poll()
        self._fail_lost_machines(group, status)
        begun = time.monotonic()
        while status.errors and not status.finished:
            kinds = {kind_of(error) for error in status.errors.values()}
            seconds = {"lost": CAUSE_SECONDS, "regroup": self._ledger.rules.timeout}
            if len(kinds) > 1 or time.monotonic() - begun > seconds.get(kinds.pop(), 0.0):
                break
            status = await poll()
        if status.errors:
            self._ledger.suspects = self._suspects(group, status)
        return status

    def _fail_lost_machines(self, group: Group, status: Any) -> None:
        """Set the error of workers on unreachable machines: collectives would only time out much later."""
        silent = silent_ranks(group)
        if not silent:
            self._unreachable = set()
            return
        nodes = group.nodes()
        places = {rank: nodes[rank] for rank in silent}
        silent_nodes = [node for node in alive_nodes() if node["NodeID"] in places.values()]
        before, self._unreachable = self._unreachable, unreachable(silent_nodes)
        for rank, node in places.items():
            twice = node in before & self._unreachable
            if twice and silent[rank] > UNREACHABLE_SECONDS and status.worker_statuses[rank].error is None:
                status.worker_statuses[rank].error = WorkerHealthCheckTimeoutError(f"the machine of worker {rank}")

    def _suspects(self, group: Group, status: Any) -> dict[int, str]:
        """Return the suspects if all errors report lost peers: silent ranks, or else the ranks without an error."""
        if {kind_of(error) for error in status.errors.values()} != {"lost"}:
            return {}
        if silent := silent_ranks(group):
            return {rank: "silent" for rank in silent if rank not in status.errors}
        return {rank: "absent" for rank in status.worker_statuses if rank not in status.errors}


def silent_ranks(group: Group) -> dict[int, float]:
    """Return the ranks that have not answered in time, with the seconds. Their processes may be alive."""
    return {rank: seconds for rank, seconds in group.silences().items() if seconds > SILENT_SECONDS}


def send_with_policy() -> None:
    """Pickle the policy by value, with all modules of launch that it uses."""
    travel_by_value(__name__, *(part.__module__ for part in (free_workers, get, leaving_nodes)))
