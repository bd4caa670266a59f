"""Runs a task on Ray Train workers.

The engine trains (`launcher.engine.entry.run` on every worker). This module provides the rest:

    main thread       polls events and signals five times a second, and forwards requests
    fit thread        `fit()` of Ray Train: its controller starts and monitors the workers
    each worker       joins the process group, calls the engine, and sends events through `launcher.runners.channel`

Importing this module imports ray.train, which takes a second: import it while Ray starts (`EmbeddedRay(preload=…)`).
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

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.clusters.remote.on_host import interface_of
from launcher.config.calling_directory import add_calling_directory
from launcher.errors import Regroup
from launcher.ray_seam import kv
from launcher.ray_seam.trainer import RayTrainer
from launcher.runners import clock, controller_policy, ray_data
from launcher.runners.channel import DriverEnd, WorkerEnd, wait_for
from launcher.runners.controller_policy import ATTEMPT, LOST, REGROUP, Rules, RunPolicy
from launcher.runners.signals import Interrupts
from launcher.runners.supervision import NO_RESTARTS, Limits, Supervision, explain
from launcher.runners.worker_errors import Event, describe

__all__ = ["Event", "Limits", "WorkerSpec", "explain", "run"]


@dataclass
class WorkerSpec:
    """The arguments of a worker.

    Attributes:
        run: the key of the run in the key-value store.
        job: (main, task), pickled separately: it can only be unpickled when `python_path` is set.
        python_path: directories with the modules of the user.
        on_gpu: train on GPUs with NCCL, else on CPUs with gloo.
        meeting: a private directory for the rendezvous of workers on one machine; None: use the network.
        timeout: the time limit of a collective operation in seconds.
    """

    run: str
    job: bytes
    python_path: list[str]
    on_gpu: bool
    meeting: str | None
    timeout: float = 120.0


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
    limits: Limits = NO_RESTARTS,
) -> dict[str, Any]:
    """Run `main(task, runtime, control)` on `workers` Ray Train workers and return what rank 0 returned.

    Args:
        task: the argument of `main`. It is pickled, and its `python_path` is added to the workers' module path.
        gpus_per_worker: above 0, the workers use GPUs and NCCL, else CPUs and gloo.
        cluster: entered already. The caller has checked that the workers fit.
        on_event: called in this thread with each event of the workers, in order for each worker. Errors are raised
            instead.
        interrupts: entered already. The first signal requests a checkpoint and a stop (before training: an immediate
            stop), the second stops at once.
        main: a function that the workers can import, or "module:function".
        limits: the number of restarts after the loss of a worker, and the smallest number of workers.

    Raises:
        LaunchError: the error of the first worker that failed, with the same class.
        WorkerLost: a worker process died.
        Stopped: a signal stopped the run at once.
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
    limits: Limits = NO_RESTARTS,
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
    """Return the training function for Ray Train. It is pickled by value, since launch may not be installed there."""
    home = _home()
    pickled = pickle.dumps(spec)

    def enter() -> dict[str, Any] | None:
        import importlib
        import logging
        import pickle

        # Ray Train makes the root logger write records of user code to a file of its session, with unmasked secrets.
        # These records are in log.txt, with masked secrets.
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
    """Return Ray Train's context of this worker, with ranks and world size."""
    return ray.train.get_context()


def work(spec: WorkerSpec) -> dict[str, Any] | None:
    """Run the task on a worker. The main function of each worker."""
    began = time.time()
    context = own_context()
    rank = context.get_world_rank()
    attempt, cause = group_facts()
    with WorkerEnd(spec.run, rank, attempt=attempt) as control:
        control.send({"kind": "worker", "rank": rank, "attempt": attempt, **_process_facts()})
        difference = control.clock_difference() if rank == 0 else None
        try:
            for path in spec.python_path:
                add_calling_directory(path)
            main, task = cloudpickle.loads(spec.job)
            function = function_of(main)  # with what it imports
            imported = time.time()
            with joined(spec, context) as runtime:
                if difference is not None:  # rank 0 records durations and costs
                    clock.convert(task, difference.seconds())
                if hasattr(task, "marks"):
                    task.marks.begin("worker_imports", began)
                    task.marks.begin("process_group", imported)
                runtime.attempt, runtime.cause, runtime.machines = attempt, cause, machine_count()
                result = function(task, runtime, control)
        except BaseException as error:
            event = describe(error, rank) | {"attempt": attempt}
            control.emit(event)
            control.flush()
            # A plain exception, since the controller cannot unpickle classes of user code. The event has the details.
            mark = REGROUP if isinstance(error, Regroup) else LOST if event["aftermath"] or event["lost"] else ""
            raise RuntimeError(f"{mark}{event['error']['type']}: {event['error']['message']}") from None
    return result if rank == 0 else None


def group_facts() -> tuple[int, str]:
    """Return the number of this worker's group within the run, and the cause of its start after another group."""
    facts = json.loads(os.environ[ATTEMPT])
    return facts["attempt"], facts["cause"]


def machine_count() -> int:
    """Return the number of machines in the cluster, including the head and machines without workers."""
    return sum(node["Alive"] for node in ray.nodes())


def _process_facts() -> Event:
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
    """Join the process group of all workers for the block, and yield the `Runtime` of this worker."""
    import torch.distributed as dist

    from launcher.engine.runtime import Runtime

    timeout = timedelta(seconds=spec.timeout)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    select_interface(spec)
    if world_size > 1:
        # If it were imported later, its default arguments would refer to the process group and keep it open: the peers
        # of a worker that fails would wait until they time out.
        importlib.import_module("torch.distributed.nn.functional")

        store = _rendezvous(spec, rank, world_size, timeout)
        backend = "nccl" if spec.on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    runtime = Runtime.adopt(rank, world_size, context.get_local_rank(), context.get_local_world_size(), _device(spec))
    runtime.apply = ray_data.reader(_home(), spec.python_path, world_size)
    yield runtime
    if world_size > 1:
        dist.destroy_process_group()


def select_interface(spec: WorkerSpec) -> None:
    """Make gloo and NCCL use the network interface of this node's address."""
    from launcher.engine import rendezvous

    if spec.meeting is not None:  # one machine, which may have no network, or a host name that does not resolve
        rendezvous.stay_on_loopback()
    # By default both resolve the host name, which may be a loopback address or one of another network.
    elif (interface := interface_of(ray.util.get_node_ip_address())) is not None:
        rendezvous.use_interface(interface)


def _rendezvous(spec: WorkerSpec, rank: int, world_size: int, timeout: timedelta) -> Any:
    """Return the store for the rendezvous of the ranks.

    On one machine it is a file. On several, rank 0 listens on its node's address and publishes the port.
    """
    from launcher.engine import rendezvous

    key = f"{spec.run}/rendezvous/{group_facts()[0]}"
    if spec.meeting is not None:
        return rendezvous.file_store(Path(spec.meeting), key, world_size, timeout)
    if rank == 0:
        host = ray.util.get_node_ip_address()
        store = rendezvous.serve(rendezvous.own_address(host), world_size, timeout)
        kv.put(key, f"{host}:{store.port}")
        return store
    host, _, port = wait_for(key, timeout.total_seconds()).rpartition(":")
    return rendezvous.join(host, int(port), world_size, timeout)


def _device(spec: WorkerSpec) -> str:
    """Return the device of this worker. It sees all GPUs of its group on this machine, and uses one of them."""
    if not spec.on_gpu:
        return "cpu"
    own = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
    return f"cuda:{os.environ['CUDA_VISIBLE_DEVICES'].split(',').index(own)}"
