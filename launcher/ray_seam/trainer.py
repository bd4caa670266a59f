"""The driver's side of Ray Train: a trainer that starts the controller of `train_controller`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launcher.ray_seam.private import NODE_ID_LABEL
from launcher.ray_seam.settings import RAY_TRAIN_ENVIRONMENT
from launcher.ray_seam.train_controller import Inline, Policy, TrainController

ABORT_SECONDS = 10.0
_LOOK_SECONDS = 0.2


class RayTrainer(DataParallelTrainer):
    """Ray's data-parallel trainer, the base of TorchTrainer, with a policy of its own and fewer processes.

    The workers join their process group themselves, so the controller never imports torch. No actor serves data sets,
    because they are not Ray's. On an embedded Ray, no process monitors placement groups, which end with that Ray, and
    the controller gets its settings from the environment, so that it can use a process that Ray has started before.

    Why: TorchTrainer has no option for any of this, nor for the controller.
    Since: 2.55, for the callbacks; 2.44 or older for the rest.
    Without: a run starts seconds later, and its controller is Ray's own.

    Args:
        policy: decides for the controller, to which it is sent by value.
    """

    def __init__(self, *args: Any, policy: Policy, **options: Any) -> None:
        super().__init__(*args, **options)
        self._policy = policy
        self._controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        # Workers use the same working directory for relative paths; nothing reads Ray's metrics; no Ray Data.
        unwanted = [WorkingDirectorySetupCallback, ControllerMetricsCallback, WorkerMetricsCallback, DatasetsCallback]
        if self._policy.lean:
            unwanted.append(PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, tuple(unwanted))]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = {NODE_ID_LABEL: ray.get_runtime_context().get_node_id()}
        options: dict[str, Any] = {"num_cpus": 0, "label_selector": here}
        if not self._policy.lean:
            options["runtime_env"] = {"env_vars": RAY_TRAIN_ENVIRONMENT}
        arguments["train_fn_ref"] = Inline(arguments["train_fn_ref"].get())
        for own in ("scaling_policy", "failure_policy"):
            del arguments[own]
        self._controller = ray.remote(**options)(TrainController).remote(policy=self._policy, **arguments)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def end(self, hurry: Callable[[], bool]) -> None:
        """End the run now. The controller is asked to abort and releases its reservation; it may be starting workers.

        Without its controller Ray ends the workers, but the reservation stays as long as the cluster: so the controller
        is killed only when it does not respond, or when `hurry` returns true.
        """
        if self._controller is None:
            return
        aborted = self._controller.abort.remote()
        deadline = time.monotonic() + ABORT_SECONDS
        while time.monotonic() < deadline and not hurry():
            if ray.wait([aborted], timeout=_LOOK_SECONDS)[0]:
                return
        with contextlib.suppress(Exception):
            ray.kill(self._controller)
