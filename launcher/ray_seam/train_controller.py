"""Ray Train's controller, with a `Policy` that decides on retries, group sizes, and the health of workers.

Why: Ray Train has no public interface for them. Its own policies count all failures alike, start a group on a machine
that does not respond, and report a lost peer as an error of user code.
Since: 2.58, which introduced `PreemptionError`.
Without: no elastic training, and a worker that hangs or a machine that is lost ends the run.

The controller may run where launch is not installed: this module is pickled by value (`travel_by_value`), and refers to
names of launch, never to its modules.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

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

from launcher.ray_seam.private import NODE_ID_LABEL
from launcher.ray_seam.settings import HEALTH_CHECK_TIMEOUT, START_TIMEOUT

__all__ = [
    "ControllerError",
    "Group",
    "Inline",
    "Policy",
    "PreemptionError",
    "TrainController",
    "WorkerGroupError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "travel_by_value",
]

SMALL_MESSAGE_SECONDS = 20.0  # the time limit for a small message to all workers
POLL_SECONDS = 0.25  # between two checks for free resources


class Policy(Protocol):
    """The decisions of a `TrainController`, made in the controller's process."""

    lean: bool  # an embedded Ray, without an autoscaler
    workers: int  # the largest group
    share: dict[str, float]  # resources of one worker
    health_seconds: float  # without an answer, after which a worker has failed
    start_seconds: float  # that a reservation may take

    def retry(self, error: Exception) -> bool:
        """Return whether another group is started after this failure."""

    def new_size(self) -> int | None:
        """Return how many workers the next group has; None: wait.

        Raises:
            WorkerGroupStartupTimeoutError: it has waited for long enough.
        """

    def waiting(self) -> bool:
        """Return whether a group waits for free resources."""

    def avoided_nodes(self) -> Iterable[str]:
        """Return the ids of nodes on which no worker may be placed."""

    def group_begins(self) -> None:
        """A group is about to be started."""

    def worker_environment(self) -> dict[str, str]:
        """Return variables that each worker gets before it runs anything."""

    def group_reserved(self, placement_group: str) -> None:
        """The processes of a group run. placement_group: the id of its reservation, hexadecimal."""

    def group_started(self) -> None:
        """A group has been started."""

    def observe(self, size: int) -> None:
        """A group of this size runs without errors."""

    async def examine(self, group: Group, poll: Callable[[], Awaitable[Any]]) -> Any:
        """Poll the workers, and return Ray's status of them: `errors`, `finished`, `worker_statuses` by rank."""

    def group_ends(self, nodes: list[str]) -> None:
        """A group has failed, and is about to be killed. nodes: the node of each worker."""


class Inline:
    """A reference to the training function, as Ray Train calls it, that contains the function.

    Why: Ray's own reference is an entry of the object store, which a worker fetches from any node that has a copy. If
    that node has just been lost, Ray retries for half a minute.
    Since: 2.44 or older.
    Without: a restart after the loss of a machine takes half a minute longer.
    """

    def __init__(self, function: Any) -> None:
        self._function = ray.cloudpickle.dumps(function)

    def get(self) -> Any:
        return ray.cloudpickle.loads(self._function)


class Retries(FailurePolicy):
    """Passes failures to the policy. Why, since, without: see the module."""

    def __init__(self, failure_config: Any, policy: Policy) -> None:
        super().__init__(failure_config)
        self._policy = policy

    def make_decision(self, training_failed_error: Any) -> Any:
        return FailureDecision.RETRY if self._policy.retry(training_failed_error) else FailureDecision.RAISE


class Sizes(ScalingPolicy):
    """Gets the size of each group from the policy.

    Why: see the module. An embedded Ray has no autoscaler, so that the coordinator's actor would be one process more.
    Since: 2.55.
    Without: groups of a fixed size.
    """

    def __init__(self, scaling_config: Any, policy: Policy) -> None:
        super().__init__(scaling_config)
        self._policy = policy

    def _get_num_workers_for_resource_request(self) -> int:
        return self._policy.workers

    def after_controller_start(self, train_run_context: Any) -> None:
        if not self._policy.lean:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self._policy.lean:
            super()._maybe_send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._maybe_send_resource_request()
        size = self._policy.new_size()
        return NoopDecision() if size is None else ResizeDecision(size, self._policy.share)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        self._policy.observe(len(worker_group_status.worker_statuses))
        return NoopDecision()


class Group(WorkerGroup):
    """A worker group that releases its resources when it fails to start, and whose workers are killed at the end.

    Why: Ray keeps the reservation of a group that fails to start, and waits for workers that hang.
    Since: 2.44 or older.
    Without: a restart waits for workers that do not respond.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self.shutdown()
            raise

    def silences(self) -> dict[int, float]:
        """Return for how many seconds each rank with a pending health check has not answered it."""
        now = time.monotonic()
        return {rank: now - poll.start_time for rank, poll in self._world_rank_to_ongoing_poll.items()}

    def nodes(self) -> list[str]:
        """Return the node of each worker, by rank."""
        return [worker.metadata.node_id for worker in self.get_workers()]

    def kill(self) -> None:
        if self.has_started():
            for worker in self.get_workers():
                ray.kill(worker.actor)


class Introduction(WorkerGroupCallback):
    """Sets variables in each worker before it runs anything. Why, since, without: see the module."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def after_worker_group_start(self, worker_group: Any) -> None:
        values = self._policy.worker_environment()

        def introduce() -> None:
            os.environ.update(values)

        ray.get(worker_group.execute_async(introduce), timeout=SMALL_MESSAGE_SECONDS)
        handle = worker_group.get_worker_group_state().placement_group_handle
        self._policy.group_reserved(handle.placement_group.id.hex())


class Avoidance(ControllerCallback):
    """Places no worker on the nodes that the policy avoids.

    Why: Ray treats a machine as alive for a minute after it lost its network, and never grants a reservation there.
    Since: 2.49.
    Without: a restart after the loss of a machine takes a minute.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        avoided = sorted(self._policy.avoided_nodes())
        return {NODE_ID_LABEL: f"!in({','.join(avoided)})"} if avoided else None


class TrainController(RayTrainController):
    """The controller. It runs as an actor. Why, since, without: see the module."""

    worker_group_cls = Group

    def __init__(self, policy: Policy, callbacks: list[Any], **arguments: Any) -> None:
        self._policy = policy
        os.environ[HEALTH_CHECK_TIMEOUT] = str(policy.health_seconds)
        os.environ[START_TIMEOUT] = str(policy.start_seconds)
        context = arguments["train_run_context"]
        arguments["scaling_policy"] = Sizes(context.scaling_config, policy)
        arguments["failure_policy"] = Retries(context.run_config.failure_config, policy)
        super().__init__(callbacks=[*callbacks, Introduction(policy), Avoidance(policy)], **arguments)

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        # First, so that the next group can use the resources of the failed group.
        if self._worker_group:
            if self._worker_group.has_started():
                self._policy.group_ends(self._worker_group.nodes())
            self._worker_group.kill()
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        self._policy.group_begins()
        super()._start_worker_group(num_workers=num_workers, resources_per_worker=resources_per_worker)
        self._policy.group_started()

    async def _step(self) -> Any:
        if self._policy.waiting():
            await asyncio.sleep(POLL_SECONDS)  # Ray's own loop does not pause
        return await super()._step()

    async def _poll_workers(self) -> Any:
        return await self._policy.examine(self._worker_group, super()._poll_workers)


def travel_by_value(*modules: str) -> None:
    """Send this module, and others of launch, with the objects that refer to them.

    Why: a controller may run where launch is not installed. `ray.cloudpickle` is not documented.
    Since: 2.44 or older.
    Without: the head of a cluster needs launch in its module path.
    """
    for module in (__name__, *modules):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
