"""Runs a job whose workers are replaced one by one while the others go on (`scaling.heal=true`), on Ray Train.

Ray Train's replica groups (made for torchft: `ray/train/v2/torch/torchft_config.py`) start a single worker anew in the
place of one that failed, and leave the others alone. Of torchft itself nothing is used: its commit is each replica's
own, and its sampler repeats and leaves out samples. Who trains with whom is the workers' own affair, see
`engine.membership`; they meet in Ray's key-value store, which lives with the cluster.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.experimental import internal_kv
from ray.train.backend import BackendConfig

from launcher.clusters.existing import ExistingRay
from launcher.clusters.local import EmbeddedRay
from launcher.errors import Stopped, WorkerLost
from launcher.runners import ray_train
from launcher.runners.channel import DriverEnd, WorkerEnd
from launcher.runners.policies import Rules
from launcher.runners.preemption import Evictions, RayCluster
from launcher.runners.ray_train import Order
from launcher.runners.reports import Event, describe, rebuild
from launcher.runners.signals import STOPPING, Interrupts
from launcher.runners.supervision import LOOK_SECONDS

GRACE_SECONDS = 5.0  # for the workers to end once the result is there; a replacement may still be starting
STARTS = 5  # of each worker, without a step in between: then replacing does not help
_NAMESPACE = b"launch"


def run(
    task: Any,
    *,
    workers: int,
    cpus_per_worker: float,
    cluster: EmbeddedRay | ExistingRay,
    on_event: Callable[[Event], None],
    interrupts: Interrupts,
    main: Callable[..., dict[str, Any]] | str = "launcher.engine.entry:run",
) -> dict[str, Any]:
    """Run `main(task, runtime, control)` on `workers` workers on CPUs, and return what rank 0 returned.

    Like `ray_train.run`; the runtime has a `membership`.

    Raises:
        LaunchError: the first genuine error of any worker.
        WorkerLost: workers die as soon as they are started.
        Stopped: ended at once by a signal.
    """
    order = Order(
        run=f"launch-{uuid.uuid4().hex[:12]}",
        job=cloudpickle.dumps((main, task)),
        python_path=list(task.python_path),
        on_gpu=False,
        loopback=cluster.one_machine,
    )
    trainer = ray_train.Trainer(
        ray_train._entrance(order, __name__),
        rules=Rules(order.run, workers, workers, {"CPU": cpus_per_worker}, lean=not cluster.existing),
        heals=True,
        backend_config=_replaceable(),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus_per_worker}),
        run_config=ray.train.RunConfig(
            name=order.run,
            storage_path=str(cluster.directory),
            failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=0),
        ),
    )
    supervision = _Supervision(trainer, DriverEnd(order.run), on_event, interrupts, cluster, workers)
    try:
        return supervision.watch()
    finally:
        if cluster.dead_process() is None:
            supervision.channel.close()


def _replaceable() -> BackendConfig:
    """Return a backend that does nothing, for workers each of which is a replica group of its own.

    Classes within a function travel to the controller by value, where this package may not be installed.
    """
    from ray.train.backend import Backend

    class Alone(Backend):
        has_replica_groups = True

    class Replaceable(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Alone

    return Replaceable()


class _Supervision:
    """One run, seen from the driver. Workers come and go; the run ends with its result, or with an error of ours.

    Ray Train replaces a worker for whatever reason it failed, and would do so for ever: a genuine error, and workers
    that die before anybody does a step, end the run here.
    """

    def __init__(
        self,
        trainer: ray_train.Trainer,
        channel: DriverEnd,
        on_event: Callable[[Event], None],
        interrupts: Interrupts,
        cluster: EmbeddedRay | ExistingRay,
        workers: int,
    ) -> None:
        self.channel = channel
        self._trainer, self._on_event, self._interrupts = trainer, on_event, interrupts
        self._cluster, self._workers = cluster, workers
        self._evictions: Evictions | None = None
        if cluster.existing:
            self._evictions = Evictions(RayCluster(), self._note, heals=True)
        self._nodes: dict[int, tuple[str, str]] = {}  # by slot: Ray's id of the node, and its name
        self._pace: Event | None = None
        self._result: dict[str, Any] | None = None
        self._training = False
        self._step = -1
        self._starts = 0  # since the last step
        self._outcome: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="launch-fit", daemon=True)

    def watch(self) -> dict[str, Any]:
        stopping = False
        self._thread.start()
        while self._thread.is_alive() and self._result is None:
            self._thread.join(LOOK_SECONDS)
            if dead := self._cluster.dead_process():
                raise WorkerLost(
                    f"Ray's own process {dead} ended on this machine; it was killed, perhaps by the kernel for want of "
                    "memory. Continue the run from its newest checkpoint with run.resume=true."
                )
            self._look()
            if self._evictions and self._evictions.look(dict(self._nodes.values()), self._pace, time.time()) == "stop":
                self.channel.request("stop")  # the machine of this command goes, and with it the run
            if self._interrupts.count >= 2 or (self._interrupts.count and not self._training):
                self._end()
                raise Stopped(self._interrupts.signal_number or 0)
            if self._interrupts.count and not stopping:
                stopping = True
                self.channel.request("stop")
                self._on_event(STOPPING)
        self._look()
        if self._result is None:
            raise ray_train.explain(self._outcome or RuntimeError("the workers ended without a result"), {}, [])
        self._thread.join(GRACE_SECONDS)
        if self._thread.is_alive():  # Ray still starts a worker, which would find nothing to do
            self._end()
        return self._result

    def _note(self, text: str) -> None:
        self._on_event({"kind": "note", "text": text})

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._outcome = error

    def _end(self) -> None:
        seen = self._interrupts.count
        self._trainer.end(hurry=lambda: self._interrupts.count > seen)
        self._thread.join(timeout=5)

    def _look(self) -> None:
        try:
            events = self.channel.drain()
        except Exception:  # Ray itself is going down: how it ended is told by `fit`
            return
        for event in events:
            kind = event.get("kind")
            if kind == "result":
                self._result = event["result"]
            elif kind == "worker":
                self._started(event)
            elif kind == "pace":
                self._pace = event
            elif kind == "error" and not event["aftermath"]:
                self._end()
                raise rebuild(event)
            elif kind != "error":
                self._training = self._training or kind == "progress" or event.get("name") == "training"
                if kind == "progress" and event["step"] > self._step:
                    self._step, self._starts = event["step"], 0
                self._on_event(event)

    def _started(self, event: Event) -> None:
        self._starts += 1
        self._nodes[event["rank"]] = (event["node"], event["host"])
        if self._starts > STARTS * self._workers:
            self._end()
            raise WorkerLost(
                f"{self._starts} worker processes were started without one step done: they die as soon as they are "
                "there, killed by somebody or by the kernel for want of memory. Lower trainer.microbatch_size or "
                "scaling.workers, and continue from the newest checkpoint with run.resume=true."
            )
        if event["replaces"]:
            self._note(
                f"A new worker {event['rank']} (process {event['pid']} on {event['host']}) starts, and will join."
            )


# ---- the workers' side ----------------------------------------------------------------------------------------------


class _Cluster:
    """Ray's key-value store as `engine.membership.Store`."""

    def __init__(self, run: str) -> None:
        self._prefix = f"{run}/heal/"

    def put(self, key: str, value: str) -> None:
        internal_kv._internal_kv_put(self._prefix + key, value, overwrite=False, namespace=_NAMESPACE)

    def get(self, key: str) -> str | None:
        value = internal_kv._internal_kv_get(self._prefix + key, namespace=_NAMESPACE)
        return None if value is None else value.decode()

    def keys(self, prefix: str) -> list[str]:
        found = internal_kv._internal_kv_list(self._prefix + prefix, namespace=_NAMESPACE)
        return [key.decode().removeprefix(self._prefix) for key in found]


def work(order: Order) -> None:
    """Everything that one worker does."""
    began = time.time()
    context = ray_train.own_context()
    slot = context.get_world_rank()  # among the replica groups, each of which is one worker
    store = _Cluster(order.run)
    # Each process sends under a number of its own: what the one before it in this slot sent may still be on its way.
    with WorkerEnd(order.run, uuid.uuid4().int % 100_000) as control:
        replaces = store.get("generation/0") is not None
        control.emit({"kind": "worker", "rank": slot, "replaces": replaces, **ray_train._whereabouts()})
        control.flush()
        try:
            sys.path[:0] = [path for path in order.python_path if path not in sys.path]
            main, task = cloudpickle.loads(order.job)
            function = ray_train.function_of(main)
            if hasattr(task, "marks"):
                task.marks.begin("worker_imports", began)
                task.marks.begin("process_group")
            with _member(order, store, slot, context) as runtime:
                runtime.machines = ray_train.machines()
                result = function(task, runtime, control)
                if runtime.is_first and result:
                    control.emit({"kind": "result", "result": result})
        except BaseException as error:
            event = describe(error, slot)
            control.emit(event)
            control.flush()
            if not event["aftermath"]:
                time.sleep(ray_train.ABORT_SECONDS)  # the driver ends the run, which Ray would heal
            # Plain, since the controller unpickles it and knows nothing of user code. The event carries the rest.
            raise RuntimeError(f"{event['type']}: {event['message']}") from None


@contextlib.contextmanager
def _member(order: Order, store: _Cluster, slot: int, context: Any) -> Iterator[Any]:
    """Be a member of the run, and yield this worker's rank facts."""
    importlib.import_module("torch.distributed.nn.functional")  # before a group exists, see `ray_train.joined`

    from launcher.engine.membership import Membership
    from launcher.engine.runtime import Runtime

    ray_train.choose_interface(order)
    host = "127.0.0.1" if order.loopback else ray.util.get_node_ip_address()
    # Ray tells each of them that it is alone on its machine; memory and cores are shared all the same.
    workers_here = context.get_world_size() if order.loopback else 1
    store.put("secret", secrets.token_hex(16))
    membership = Membership(store, slot, context.get_world_size(), host, store.get("secret") or "")
    try:
        runtime = Runtime.healing(membership, 0, workers_here, "cpu")
        yield runtime
        runtime.leave_groups()
    finally:
        membership.close()
