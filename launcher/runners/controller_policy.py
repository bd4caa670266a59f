"""The policy of Ray Train's controller: what is retried, with how many workers, and which workers count as alive.

The controller is an actor that may run on a machine without this package. The module is therefore pickled by value (see
`send_with_policy`) and imports nothing of launcher but `free_capacity` and parts of `ray_seam`, which are pickled with
it. The policy sends its decisions to the driver as events, through the run's part of the key-value store
(`launcher.runners.channel`).

    worker dies, hangs, loses a peer    the group ends, the next one continues from the newest checkpoint; counted
    all ranks raise Regroup             the same, not counted: an eviction notice, or a node that has come
    anything else a worker raises       the run fails: it would fail again
    memory of a machine used up         the run fails: it would fail again
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
from launcher.runners.free_capacity import alive_nodes, room, rooms, unreachable

# How a worker marks what it raises, since the controller knows none of our exceptions.
LOST, REGROUP = "[lost] ", "[regroup] "
ATTEMPT = "LAUNCH_ATTEMPT"  # the variable that tells a worker which group it belongs to
PATIENCE = 3.0  # seconds between the first report of a lost peer and the judgement: the cause may come after it
SILENCE = 2.0  # seconds without an answer after which a worker is suspected of a hang that others complain of
# Seconds that a worker whose machine is out of reach may be silent: shorter cuts are bridged by TCP, without a restart.
OUT_OF_REACH = 6.0
KNOWN_SECONDS = 4.0  # that the knowledge of who is out of reach is good for: to ask again takes long
GROW_SECONDS = 10.0  # between two looks for more room
START_SECONDS = 10.0  # that a reservation may take before the nodes are looked at anew: one may just have gone
FREED_SECONDS = 3.0  # that Ray takes at most to see that what a group held is free again


@dataclass
class Rules:
    """What the driver asks of the controller.

    Args:
        run: the key of the run in the store.
        workers: how many there are at most.
        min_workers: how many there are at least.
        share: what each reserves.
        max_failures: restarts in a row without a newer checkpoint between them; then the run fails.
        timeout: seconds after which a worker that does not answer is given up.
        lean: a Ray of our own, where no autoscaler is asked.
        room_seconds: how long the first group waits for room.
        later_seconds: the same for those after it: a machine that was lost may be replaced by a new one.
    """

    run: str
    workers: int
    min_workers: int
    share: dict[str, float]
    max_failures: int = 0
    timeout: float = 120.0
    lean: bool = True
    room_seconds: float = 60.0
    later_seconds: float = 600.0


@dataclass
class Ledger:
    """What the parts of the controller know together."""

    rules: Rules
    attempt: int = 0
    cause: str = ""
    failures: int = 0  # in a row
    resumed: int = -1  # the step from which the attempt of the last failure had begun
    resizing: bool = False
    held: list[str] = field(default_factory=list)  # the node of each worker of the last group
    looked: float = 0.0  # when more room was last looked for
    wanting: float | None = None  # since when a group is wanted for which there is no room
    suspects: dict[int, str] = field(default_factory=dict)
    told: int = 0
    _gone: tuple[float, frozenset[str]] = (float("-inf"), frozenset())  # when asked, and the answer

    def gone(self) -> frozenset[str]:
        """Return the nodes that Ray believes alive and that do not answer."""
        if time.monotonic() - self._gone[0] > KNOWN_SECONDS:
            self._gone = (time.monotonic(), frozenset(unreachable(alive_nodes())))
        return self._gone[1]

    def read(self, key: str) -> str | None:
        return get(f"{self.rules.run}/{key}")

    def write(self, key: str, value: str) -> None:
        put(f"{self.rules.run}/{key}", value)

    def tell(self, **event: Any) -> None:
        self.write(f"event/{self.attempt:06d}/controller/{self.told:09d}", json.dumps([event]))
        self.told += 1

    def begin_attempt(self) -> None:
        # From the store, since a controller before this one may have died.
        self.attempt = int(self.read("attempt") or 0) + 1
        self.cause = self.read("cause") or ""
        self.write("attempt", str(self.attempt))
        self.write("cause", "")
        self.suspects, self.resizing, self.looked = {}, False, time.monotonic()

    def still_waits(self) -> bool:
        """Whether a group for which there is no room is waited for a little longer."""
        seconds = self.rules.later_seconds if self.attempt else self.rules.room_seconds
        if self.wanting is None:
            self.wanting = time.monotonic()
            self.tell(kind="waiting", seconds=seconds)
        return time.monotonic() - self.wanting < seconds

    def count_failure(self) -> bool:
        """Count one more failure; return whether it is one too many."""
        resumed = int(self.read("resumed") or 0)
        self.failures = 1 if resumed > self.resumed else self.failures + 1
        self.resumed = resumed
        return self.failures > self.rules.max_failures


# ---- what is tried again --------------------------------------------------------------------------------------------


def kind_of(error: Exception) -> str:
    """Return what a worker's failure is: "dead", "preempted", "silent", "lost", "regroup" or "final"."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return "preempted" if getattr(error.health_check_failure, "preempted", False) else "dead"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "silent"
    text = str(error)
    return "lost" if LOST in text else "regroup" if REGROUP in text else "final"


def suspects(failures: dict[int, Exception]) -> dict[int, str]:
    """Return who failed first, as far as the failures themselves tell, and how: "dead", "memory" or "silent"."""
    found = {}
    for rank, error in failures.items():
        kind = kind_of(error)
        if kind in ("dead", "preempted", "silent"):
            memory = kind == "dead" and ("OutOfMemoryError" in str(error) or "low on memory" in str(error))
            found[rank] = "memory" if memory else kind
    return found


# ---- with how many workers ------------------------------------------------------------------------------------------


def freed_less(found: dict[str, int], held: list[str]) -> bool:
    """Whether a node has room for fewer workers than it held; of nodes that are gone or leaving nothing is asked."""
    return any(node in found and found[node] < count for node, count in Counter(held).items())


# ---- the policy -----------------------------------------------------------------------------------------------------


class RunPolicy:
    """Decides for the controller of one run. See `launcher.ray_seam.train_controller.Policy` for its methods."""

    def __init__(self, rules: Rules) -> None:
        self._ledger = Ledger(rules)
        self._out_of_reach: set[str] = set()  # nodes, at the last look
        self.lean, self.workers, self.share = rules.lean, rules.workers, rules.share
        self.health_seconds, self.start_seconds = rules.timeout, START_SECONDS

    # What is tried again.

    def retry(self, error: Exception) -> bool:
        cause = self._cause(error)
        ledger = self._ledger
        again = cause is not None and not (cause == "failure" and ledger.count_failure())
        waits = cause == "room"
        if not waits:
            ledger.tell(
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
        """Return why a new group is to be started, or None where it must not."""
        ledger = self._ledger
        if isinstance(error, PreemptionError):
            return "preemption"
        if isinstance(error, ControllerError):
            failure = error.controller_failure
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                return "room" if ledger.still_waits() else None
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

    # With how many workers, and where.

    def new_size(self) -> int | None:
        ledger, rules = self._ledger, self._ledger.rules
        if rules.min_workers >= rules.workers:
            return rules.workers
        count = min(rules.workers, self._settled_room())
        if count >= rules.min_workers:
            return count
        if not ledger.still_waits():
            raise WorkerGroupStartupTimeoutError(rules.min_workers)
        return None

    def _settled_room(self) -> int:
        """Return for how many workers there is room, once what the last group held is free again."""
        ledger = self._ledger
        gone = ledger.gone()
        end = time.monotonic() + FREED_SECONDS
        # Node by node: the room on one that has just come is not what the group held on another.
        while freed_less(found := rooms(ledger.rules.share, gone), ledger.held) and time.monotonic() < end:
            time.sleep(0.1)
        return sum(found.values())

    def observe(self, size: int) -> None:
        """Have a group that could be larger save and end; growing it is then the business of the next decision."""
        ledger = self._ledger
        small = size < ledger.rules.workers
        if small and not ledger.resizing and time.monotonic() - ledger.looked > GROW_SECONDS:
            ledger.looked = time.monotonic()
            if room(ledger.rules.share, set()) >= 1 and room(ledger.rules.share, ledger.gone()) >= 1:
                ledger.resizing = True
                ledger.tell(kind="room", attempt=ledger.attempt)

    def waiting(self) -> bool:
        return self._ledger.wanting is not None

    def avoided_nodes(self) -> frozenset[str]:
        return self._ledger.gone()

    def group_begins(self) -> None:
        self._ledger.begin_attempt()

    def worker_environment(self) -> dict[str, str]:
        return {ATTEMPT: json.dumps({"attempt": self._ledger.attempt, "cause": self._ledger.cause})}

    def group_reserved(self, placement_group: str) -> None:
        self._ledger.write("placement_group", placement_group)

    def group_started(self) -> None:
        self._ledger.wanting = None

    def group_ends(self, nodes: list[str]) -> None:
        self._ledger.held = nodes

    # What counts as alive.

    async def examine(self, group: Group, poll: Callable[[], Awaitable[Any]]) -> Any:
        """Return the workers' status; where some have lost a peer, wait for the cause, which may show a little later.

        A group that regroups is waited for until all have saved.
        """
        status = await poll()
        self._give_up_machines(group, status)
        begun = time.monotonic()
        while status.errors and not status.finished:
            kinds = {kind_of(error) for error in status.errors.values()}
            patience = PATIENCE if kinds == {"lost"} else self._ledger.rules.timeout if kinds == {"regroup"} else 0.0
            if time.monotonic() - begun > patience:
                break
            status = await poll()
        if status.errors:
            self._ledger.suspects = self._suspects(group, status)
        return status

    def _give_up_machines(self, group: Group, status: Any) -> None:
        """Note the error of workers whose machine has been out of reach for too long: collectives wait far longer."""
        silent = silent_ranks(group)
        if not silent:
            self._out_of_reach = set()
            return
        nodes = group.nodes()
        places = {rank: nodes[rank] for rank in silent}
        asked = [node for node in alive_nodes() if node["NodeID"] in places.values()]
        before, self._out_of_reach = self._out_of_reach, unreachable(asked)
        for rank, node in places.items():
            twice = node in before & self._out_of_reach
            if twice and silent[rank] > OUT_OF_REACH and status.worker_statuses[rank].error is None:
                status.worker_statuses[rank].error = WorkerHealthCheckTimeoutError(f"the machine of worker {rank}")

    def _suspects(self, group: Group, status: Any) -> dict[int, str]:
        """Who is to blame where all that fail complain of others: who does not answer, else who does not complain."""
        if {kind_of(error) for error in status.errors.values()} != {"lost"}:
            return {}
        if silent := silent_ranks(group):
            return {rank: "silent" for rank in silent if rank not in status.errors}
        return {rank: "absent" for rank in status.worker_statuses if rank not in status.errors}


def silent_ranks(group: Group) -> dict[int, float]:
    """Return for how long those ranks have not answered that are late, though their processes may be there."""
    return {rank: seconds for rank, seconds in group.silences().items() if seconds > SILENCE}


def send_with_policy() -> None:
    """Have a policy travel to the controller with all that it refers to of launch."""
    travel_by_value(__name__, *(part.__module__ for part in (room, get, leaving_nodes)))
