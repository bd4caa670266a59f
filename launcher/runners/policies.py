"""Ray Train's controller with rules of our own: what is tried again, with how many workers, and what counts as alive.

The controller is an actor, on a machine where this package may not be installed: the module travels to it by value
(see `travel_by_value`) and imports nothing of launcher but `room` and parts of `ray_seam`, which travel too. What it
decides it tells the driver through the run's part of the key-value store, as one more sender of events
(`launcher.runners.channel`).

    worker dies, hangs, loses a peer    the group ends, the next one continues from the newest checkpoint; counted
    all ranks raise Regroup             the same, not counted: an eviction notice, or a node that has come
    anything else a worker raises       the run fails: it would fail again
    memory of a machine used up         the run fails: it would fail again
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController as RayTrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from launcher.ray_seam.kv import get, put
from launcher.ray_seam.private import NODE_ID_LABEL, leaving_nodes
from launcher.runners.room import alive_nodes, room, rooms, unreachable

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
TOLD_TO_START = 20.0  # seconds that living workers need at most to take a small message


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


class Inline:
    """What Ray Train calls a reference to the training function, with the function in it.

    Ray's own lies in the object store, from where each node brings it, and from whichever node has a copy: one that was
    lost a moment ago is asked for ten seconds at a time, until Ray has given it up after half a minute.
    """

    def __init__(self, function: Any) -> None:
        self._function = ray.cloudpickle.dumps(function)

    def get(self) -> Any:
        return ray.cloudpickle.loads(self._function)


# ---- what is tried again --------------------------------------------------------------------------------------------


class Retries(FailurePolicy):
    def __init__(self, failure_config: Any, ledger: Ledger) -> None:
        super().__init__(failure_config)
        self._ledger = ledger

    def make_decision(self, training_failed_error: Any) -> Any:
        cause = self._cause(training_failed_error)
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
        return FailureDecision.RETRY if again else FailureDecision.RAISE

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


class Workers(ScalingPolicy):
    """As many workers as there is room for, between `min_workers` and `workers`."""

    def __init__(self, scaling_config: Any, ledger: Ledger) -> None:
        super().__init__(scaling_config)
        self._ledger = ledger

    def _get_num_workers_for_resource_request(self) -> int:
        return self._ledger.rules.workers

    def after_controller_start(self, train_run_context: Any) -> None:
        if not self._ledger.rules.lean:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self._ledger.rules.lean:
            super()._maybe_send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._maybe_send_resource_request()
        ledger, rules = self._ledger, self._ledger.rules
        count = rules.workers
        if rules.min_workers < rules.workers:
            count = min(count, self._settled_room())
            if count < rules.min_workers:
                if not ledger.still_waits():
                    raise WorkerGroupStartupTimeoutError(rules.min_workers)
                return NoopDecision()
        return ResizeDecision(num_workers=count, resources_per_worker=rules.share)

    def _settled_room(self) -> int:
        """Return for how many workers there is room, once what the last group held is free again."""
        ledger = self._ledger
        gone = ledger.gone()
        end = time.monotonic() + FREED_SECONDS
        # Node by node: the room on one that has just come is not what the group held on another.
        while freed_less(found := rooms(ledger.rules.share, gone), ledger.held) and time.monotonic() < end:
            time.sleep(0.1)
        return sum(found.values())

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Have a group that could be larger save and end; growing it is then the business of the next decision."""
        self._maybe_send_resource_request()
        ledger = self._ledger
        small = len(worker_group_status.worker_statuses) < ledger.rules.workers
        if small and not ledger.resizing and time.monotonic() - ledger.looked > GROW_SECONDS:
            ledger.looked = time.monotonic()
            if room(ledger.rules.share, set()) >= 1 and room(ledger.rules.share, ledger.gone()) >= 1:
                ledger.resizing = True
                ledger.tell(kind="room", attempt=ledger.attempt)
        return NoopDecision()


# ---- what counts as alive -------------------------------------------------------------------------------------------


class Group(WorkerGroup):
    """A worker group that leaves nothing behind when it fails to start."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self.shutdown()
            raise

    def silent_ranks(self) -> dict[int, float]:
        """Return for how long those ranks have not answered that are late, though their processes may be there."""
        now = time.monotonic()
        silences = {rank: now - poll.start_time for rank, poll in self._world_rank_to_ongoing_poll.items()}
        return {rank: seconds for rank, seconds in silences.items() if seconds > SILENCE}

    def kill(self) -> None:
        """End the processes without asking them: what they do has failed, and some of them may not answer."""
        if self.has_started():
            for worker in self.get_workers():
                ray.kill(worker.actor)


class Introduction(WorkerGroupCallback):
    """Tells each worker of a group, before it does anything, which attempt it belongs to."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def after_worker_group_start(self, worker_group: Any) -> None:
        ledger = self._ledger
        facts = json.dumps({"attempt": ledger.attempt, "cause": ledger.cause})

        def introduce() -> None:
            os.environ[ATTEMPT] = facts

        ray.get(worker_group.execute_async(introduce), timeout=TOLD_TO_START)
        handle = worker_group._worker_group_state.placement_group_handle
        ledger.write("placement_group", handle.placement_group.id.hex())


class Avoidance(ControllerCallback):
    """Has no group placed on a machine that does not answer."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        gone = self._ledger.gone()
        return {NODE_ID_LABEL: f"!in({','.join(sorted(gone))})"} if gone else None


class TrainController(RayTrainController):
    worker_group_cls = Group

    def __init__(self, rules: Rules, callbacks: list[Any], **arguments: Any) -> None:
        self._ledger = Ledger(rules)
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(rules.timeout)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_SECONDS)
        context = arguments["train_run_context"]
        arguments["scaling_policy"] = Workers(context.scaling_config, self._ledger)
        arguments["failure_policy"] = Retries(context.run_config.failure_config, self._ledger)
        self._out_of_reach: set[str] = set()  # nodes, at the last look
        super().__init__(callbacks=[*callbacks, Introduction(self._ledger), Avoidance(self._ledger)], **arguments)

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        # First, so that what the failed group holds can be given to the next.
        if self._worker_group:
            if self._worker_group.has_started():
                self._ledger.held = [worker.metadata.node_id for worker in self._worker_group.get_workers()]
            self._worker_group.kill()
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        self._ledger.begin_attempt()
        super()._start_worker_group(num_workers=num_workers, resources_per_worker=resources_per_worker)
        self._ledger.wanting = None

    async def _step(self) -> Any:
        if self._ledger.wanting is not None:
            await asyncio.sleep(0.25)  # Ray's loop would not: nodes come when they come
        return await super()._step()

    async def _poll_workers(self) -> Any:
        """Return the workers' status; where some have lost a peer, wait for the cause, which may show a little later.

        A group that regroups is waited for until all have saved.
        """
        status = await super()._poll_workers()
        self._give_up_machines(status)
        begun = time.monotonic()
        while status.errors and not status.finished:
            kinds = {kind_of(error) for error in status.errors.values()}
            patience = PATIENCE if kinds == {"lost"} else self._ledger.rules.timeout if kinds == {"regroup"} else 0.0
            if time.monotonic() - begun > patience:
                break
            status = await super()._poll_workers()
        if status.errors:
            self._ledger.suspects = self._suspects(status)
        return status

    def _give_up_machines(self, status: Any) -> None:
        """Note the error of workers whose machine has been out of reach for too long: collectives wait far longer."""
        silent = self._worker_group.silent_ranks()
        if not silent:
            self._out_of_reach = set()
            return
        workers = self._worker_group.get_workers()
        places = {rank: workers[rank].metadata.node_id for rank in silent}
        asked = [node for node in alive_nodes() if node["NodeID"] in places.values()]
        before, self._out_of_reach = self._out_of_reach, unreachable(asked)
        for rank, node in places.items():
            twice = node in before & self._out_of_reach
            if twice and silent[rank] > OUT_OF_REACH and status.worker_statuses[rank].error is None:
                status.worker_statuses[rank].error = WorkerHealthCheckTimeoutError(f"the machine of worker {rank}")

    def _suspects(self, status: Any) -> dict[int, str]:
        """Who is to blame where all that fail complain of others: who does not answer, else who does not complain."""
        if {kind_of(error) for error in status.errors.values()} != {"lost"}:
            return {}
        if silent := self._worker_group.silent_ranks():
            return {rank: "silent" for rank in silent if rank not in status.errors}
        return {rank: "absent" for rank in status.worker_statuses if rank not in status.errors}


def travel_by_value() -> None:
    """Have the classes of this module travel with all that they are."""
    # A function that travels names what it needs, since a module that it names would have to be there.
    for module in (__name__, room.__module__, get.__module__, leaving_nodes.__module__):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
