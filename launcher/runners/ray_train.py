"""Runs a job on Ray Train workers: places them, joins them, listens to them, and says what went wrong.

The engine does the training (`launcher.engine.entry.run` on every worker). Here is what surrounds it:

    main thread       looks for events and signals five times a second, and forwards requests
    helper thread     `fit()`: Ray Train's controller, which starts the workers and watches them
    each worker       joins the process group, calls the engine, talks through `launcher.runners.channel`

Importing this module imports ray.train (a second): do it while Ray starts, see `EmbeddedRay(preload=…)`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.train.backend import BackendConfig

from launcher.clusters.existing.existing_ray import ExistingRay, interface_of
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.config.calling_directory import add_calling_directory
from launcher.errors import Regroup
from launcher.ray_seam.trainer import RayTrainer
from launcher.runners import controller_policy, ray_data
from launcher.runners.channel import DriverEnd, WorkerEnd, publish, wait_for
from launcher.runners.controller_policy import ATTEMPT, LOST, REGROUP, Rules, RunPolicy
from launcher.runners.signals import Interrupts
from launcher.runners.supervision import NEVER_AGAIN, Limits, Supervision, explain
from launcher.runners.worker_errors import Event, describe

__all__ = ["Event", "Limits", "WorkerSpec", "explain", "run"]


@dataclass
class WorkerSpec:
    """What one worker is told, beside what Ray Train knows."""

    run: str
    job: bytes  # (main, task), pickled apart: it can only be read once `python_path` is there
    python_path: list[str]
    on_gpu: bool
    meeting: str | None  # a private directory where workers of one machine meet; None: they meet over the network
    timeout: float = 120.0  # seconds that a collective operation may take


def run(
    task: Any,
    *,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    cluster: EmbeddedRay | ExistingRay,
    on_event: Callable[[Event], None],
    interrupts: Interrupts,
    main: Callable[..., dict[str, Any]] | str = "launcher.engine.entry:run",
    limits: Limits = NEVER_AGAIN,
) -> dict[str, Any]:
    """Run `main(task, runtime, control)` on `workers` Ray Train workers and return what rank 0 returned.

    Args:
        task: what `main` gets; it is pickled, and its `python_path` is put before the workers' module path.
        gpus_per_worker: above 0 the workers compute on GPUs and talk over NCCL, else on CPUs over gloo.
        cluster: entered already; feasibility has been checked.
        on_event: called in this thread with every event that a worker emits, those of one worker in order.
            Errors are raised instead.
        interrupts: entered already. The first signal asks the workers to stop gracefully (before training has begun: at
            once), the second ends them.
        main: a function that the workers can import, or "module:function".
        limits: how often it is tried again after the loss of a worker, and with how few workers.

    Raises:
        LaunchError: the first genuine error of any worker, as the class that it had there.
        WorkerLost: a worker process died.
        Stopped: ended at once by a signal.
    """
    spec = WorkerSpec(
        run=f"launch-{uuid.uuid4().hex[:12]}",
        job=cloudpickle.dumps((main, task)),
        python_path=list(task.python_path),
        on_gpu=gpus_per_worker > 0,
        meeting=str(cluster.directory) if cluster.one_machine else None,
        timeout=limits.timeout,
    )

    def make() -> RayTrainer:
        return make_trainer(spec, __name__, workers, cpus_per_worker, gpus_per_worker, cluster, limits)

    supervision = Supervision(make, DriverEnd(spec.run), on_event, interrupts, cluster, limits)
    try:
        return supervision.watch()
    finally:
        if cluster.dead_process() is None:
            supervision.channel.close()


# ---- the driver's side ----------------------------------------------------------------------------------------------


def make_trainer(
    spec: WorkerSpec,
    module: str,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    cluster: EmbeddedRay | ExistingRay,
    limits: Limits = NEVER_AGAIN,
) -> RayTrainer:
    """Return a trainer whose workers each call `work(spec)` of `module`."""
    share = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    rules = Rules(
        spec.run,
        workers=workers,
        min_workers=limits.min_workers or workers,
        share=share,
        max_failures=limits.max_failures,
        timeout=spec.timeout,
        lean=not cluster.existing,
    )
    controller_policy.send_with_policy()
    return RayTrainer(
        _entry(spec, module),
        policy=RunPolicy(rules),
        backend_config=BackendConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=share
        ),
        run_config=ray.train.RunConfig(
            name=spec.run,
            storage_path=str(cluster.directory),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


# ---- the workers' side ----------------------------------------------------------------------------------------------


def _entry(spec: WorkerSpec, module: str) -> Callable[[], dict[str, Any] | None]:
    """Return the training function for Ray Train, which travels by value: our package may not be installed there."""
    home = _home()
    pickled = pickle.dumps(spec)

    def enter() -> dict[str, Any] | None:
        import importlib
        import logging
        import pickle

        # Ray Train has the root logger write what user code logs into a file of its session, with secrets as they are.
        # log.txt has these lines, masked.
        root = logging.getLogger()
        for handler in [*root.handlers]:
            if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
                root.removeHandler(handler)
        if home not in sys.path:
            sys.path.append(home)
        importlib.import_module("launcher.clusters.remote.from_driver").adopt()
        return importlib.import_module(module).work(pickle.loads(pickled))

    return enter


def _home() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def own_context() -> Any:
    """Return what Ray Train tells this worker of itself: ranks and world size."""
    return ray.train.get_context()


def work(spec: WorkerSpec) -> dict[str, Any] | None:
    """Everything that one worker does."""
    began = time.time()
    context = own_context()
    rank = context.get_world_rank()
    attempt, cause = introduced()
    with WorkerEnd(spec.run, rank, attempt=attempt) as control:
        control.emit({"kind": "worker", "rank": rank, "attempt": attempt, **_whereabouts()})
        control.flush()
        try:
            for path in spec.python_path:
                add_calling_directory(path)
            main, task = cloudpickle.loads(spec.job)
            function = function_of(main)  # with what it imports
            if hasattr(task, "marks"):
                task.marks.begin("worker_imports", began)
                task.marks.begin("process_group")
            with joined(spec, context) as runtime:
                runtime.attempt, runtime.cause, runtime.machines = attempt, cause, machines()
                result = function(task, runtime, control)
        except BaseException as error:
            event = describe(error, rank) | {"attempt": attempt}
            control.emit(event)
            control.flush()
            # Plain, since the controller unpickles it and knows nothing of user code. The event carries the rest.
            mark = REGROUP if isinstance(error, Regroup) else LOST if event["aftermath"] or event["lost"] else ""
            raise RuntimeError(f"{mark}{event['error']['type']}: {event['error']['message']}") from None
    return result if rank == 0 else None


def introduced() -> tuple[int, str]:
    """Return the number of this worker's group within the run, and why it was started after another."""
    facts = json.loads(os.environ[ATTEMPT])
    return facts["attempt"], facts["cause"]


def machines() -> int:
    """Return how many machines there are in the cluster, the head and those without a worker among them."""
    return sum(node["Alive"] for node in ray.nodes())


def _whereabouts() -> Event:
    node = ray.get_runtime_context().get_node_id()
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "node": node}
    with contextlib.suppress(OSError):
        facts["stderr"] = os.readlink("/proc/self/fd/2")
    return facts


def function_of(main: Callable[..., Any] | str) -> Callable[..., Any]:
    if callable(main):
        return main
    module, _, name = main.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def joined(spec: WorkerSpec, context: Any) -> Iterator[Any]:
    """Join the process group of all workers and yield this one's rank facts."""
    import torch.distributed as dist

    from launcher.engine.runtime import Runtime

    timeout = timedelta(seconds=spec.timeout)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    choose_interface(spec)
    if world_size > 1:
        # Imported while a group exists, it would keep that group for ever as the default of its arguments: the peers of
        # a worker that fails would wait for it until they time out.
        importlib.import_module("torch.distributed.nn.functional")

        store = _rendezvous(spec, rank, world_size, timeout)
        backend = "nccl" if spec.on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    runtime = Runtime.adopt(rank, world_size, context.get_local_rank(), context.get_local_world_size(), _device(spec))
    runtime.apply = ray_data.reader(_home(), spec.python_path, world_size)
    yield runtime
    if world_size > 1:
        dist.destroy_process_group()


def choose_interface(spec: WorkerSpec) -> None:
    """Have gloo and NCCL talk over the interface of this node's address."""
    from launcher.engine import rendezvous

    if spec.meeting is not None:  # one machine: it works without a network or a name that resolves
        rendezvous.stay_on_loopback()
    # Both would take the host's name, which may stand for loopback, or another network.
    elif (interface := interface_of(ray.util.get_node_ip_address())) is not None:
        rendezvous.use_interface(interface)


def _rendezvous(spec: WorkerSpec, rank: int, world_size: int, timeout: timedelta) -> Any:
    """Return the store where the ranks meet.

    On one machine it is a file. Elsewhere rank 0 listens on its node's address and publishes the port.
    """
    from launcher.engine import rendezvous

    key = f"{spec.run}/rendezvous/{introduced()[0]}"
    if spec.meeting is not None:
        return rendezvous.file_store(Path(spec.meeting), key, world_size, timeout)
    if rank == 0:
        host = ray.util.get_node_ip_address()
        store = rendezvous.serve(rendezvous.own_address(host), world_size, timeout)
        publish(key, f"{host}:{store.port}")
        return store
    host, _, port = wait_for(key, timeout.total_seconds()).rpartition(":")
    return rendezvous.join(host, int(port), world_size, timeout)


def _device(spec: WorkerSpec) -> str:
    """Return this worker's device. Ray shows a worker all GPUs of its group on this machine: its own is one of them."""
    if not spec.on_gpu:
        return "cpu"
    own = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
    return f"cuda:{os.environ['CUDA_VISIBLE_DEVICES'].split(',').index(own)}"
