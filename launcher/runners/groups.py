"""Warm groups of Ray Train workers for sweeps. Each group runs several tasks, and starts its processes only once.

A group is a `fit()` whose workers run a loop. All ranks wait for the same numbered parcel in the cluster's key-value
store, run its task with the existing process group, release memory, and wait for the next number. An empty parcel ends
the group. After a failed task the group is reused if every rank has returned from it. If a rank hangs or has died, the
group ends, and the next task gets a new one.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from ray import cloudpickle

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.config.calling_directory import add_calling_directory
from launcher.engine.hardware import release_memory
from launcher.errors import LaunchError
from launcher.ray_seam import kv
from launcher.ray_seam.trainer import ABORT_SECONDS
from launcher.runners import clock, ray_train
from launcher.runners.channel import DriverEnd, WorkerEnd, wait_for
from launcher.runners.free_capacity import alive_nodes, unreachable
from launcher.runners.ray_train import Event, WorkerSpec
from launcher.runners.tasks import Shape, TaskOutcome, fits

# The interval of the channel. The driver decides on pruning between two evaluations: the time until its request arrives
# is wasted.
CHANNEL_SECONDS = 0.1
# The time in which all ranks of a group must report, after one has failed, before the group is killed.
FOLLOW_SECONDS = 8.0
CAPACITY_SECONDS = 2.0  # between two checks of a cluster's resources
# The time limit for the end of all groups. Ray Train's controller is killed if it does not abort in ABORT_SECONDS.
END_SECONDS = ABORT_SECONDS + 10.0


class Groups:
    """The runner of a sweep on Ray: it starts groups, and gives tasks to them.

    Args:
        cluster: entered already.
        on_event: called in the thread that calls `poll`, with the key of the task and each of its events.
        most: the largest number of groups; None: as many as fit.
        main: the function that each rank calls; see `ray_train.run`.
    """

    def __init__(
        self,
        cluster: EmbeddedRay | ExistingRay,
        on_event: Callable[[str, Event], None],
        most: int | None = None,
        main: Callable[..., dict[str, Any]] | str = "launcher.engine.entry:run",
    ) -> None:
        self._cluster = cluster
        self._on_event = on_event
        self._most = most
        self._main = main
        self._groups: list[_Group] = []
        self._available = cluster.available
        self._checked = time.monotonic()

    @property
    def running(self) -> set[str]:
        """The keys of the running tasks."""
        return {group.key for group in self._groups if group.key is not None}

    def count(self) -> int:
        return len(self._groups)

    def ready(self, shape: Shape) -> bool:
        """Return whether a task of this size can start now. If not, idle groups are ended to free their resources."""
        if self._idle(shape) is not None:
            return True
        shapes = [group.shape for group in self._groups]
        if (self._most is None or len(shapes) < self._most) and fits([*shapes, shape], *self._capacity()):
            return True
        self.release()
        return False

    def submit(self, key: str, task: Any, shape: Shape) -> None:
        """Start a task on an idle group of its size, or on a new group. Call it only after `ready` returned True."""
        group = self._idle(shape)
        if group is None:
            group = _Group(shape, list(task.python_path), self._cluster)
            self._groups.append(group)
        group.give(key, self._main, task)

    def _idle(self, shape: Shape) -> _Group | None:
        return next((group for group in self._groups if group.idle and group.shape == shape), None)

    def _capacity(self) -> tuple[float, float]:
        """Return the CPUs and GPUs of the cluster. An existing cluster may add and lose machines."""
        if self._cluster.existing and time.monotonic() - self._checked > CAPACITY_SECONDS:
            nodes = alive_nodes()
            gone = unreachable(nodes)  # Ray treats them as alive for a minute
            found = [node["Resources"] for node in nodes if node["NodeID"] not in gone]
            self._available = (sum(each.get("CPU", 0.0) for each in found), sum(each.get("GPU", 0.0) for each in found))
            self._checked = time.monotonic()
        return self._available

    def release(self) -> None:
        """End the idle groups."""
        for group in self._groups:
            if group.idle:
                group.finish()

    def poll(self) -> list[TaskOutcome]:
        """Receive the events of the workers, and return the outcomes of tasks that have ended."""
        outcomes = []
        for group in list(self._groups):
            outcome = group.poll(self._on_event)
            if outcome is not None:
                outcomes.append(outcome)
            if group.gone:
                self._groups.remove(group)
        return outcomes

    def request(self, key: str, what: str) -> None:
        """Request `what` ("stop", "prune", "checkpoint") from the ranks of a running task."""
        for group in self._groups:
            if group.key == key:
                group.request(what)

    def interrupt(self) -> None:
        """Request a checkpoint and a stop from every task that is training, and end the other tasks."""
        for group in self._groups:
            group.interrupt()

    def close(self) -> None:
        """End all groups now.

        On an existing cluster it waits until their resources are released: Ray kills this process if one of its threads
        uses a Ray after it has disconnected.
        """
        for group in self._groups:
            group.end(hurry=not self._cluster.existing)
        if self._cluster.existing:
            deadline = time.monotonic() + END_SECONDS
            for group in self._groups:
                group.join(deadline)
        self._groups = []


class _Group:
    """A group of workers, on the driver's side."""

    def __init__(self, shape: Shape, python_path: list[str], cluster: EmbeddedRay | ExistingRay) -> None:
        self.shape = shape
        self.key: str | None = None
        self._spec = WorkerSpec(
            run=f"launch-{uuid.uuid4().hex[:12]}",
            job=b"",
            python_path=python_path,
            on_gpu=shape.gpus_per_worker > 0,
            meeting=str(cluster.directory) if cluster.one_machine else None,
        )
        self._trainer = ray_train.make_trainer(
            self._spec, __name__, shape.workers, shape.cpus_per_worker, shape.gpus_per_worker, cluster
        )
        self._parcels = 0
        self._channel: DriverEnd | None = None
        self._workers: dict[int, Event] = {}
        self._errors: list[Event] = []
        self._done: dict[int, Any] = {}
        self._training = False
        self._failed_at: float | None = None
        self._rejoin = False
        self._finishing = False
        self._outcome: Any = None
        self._ending: threading.Thread | None = None
        self._thread = threading.Thread(target=self._fit, name="launch-fit", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer.fit()
        except BaseException as error:
            self._outcome = error

    @property
    def idle(self) -> bool:
        return self.key is None and not self._finishing and self._thread.is_alive()

    @property
    def gone(self) -> bool:
        return self.key is None and not self._thread.is_alive()

    def give(self, key: str, main: Any, task: Any) -> None:
        self.key, self._errors, self._done = key, [], {}
        self._training, self._failed_at = False, None
        self._channel = DriverEnd(f"{self._spec.run}/{self._parcels}")
        parcel = cloudpickle.dumps((self._rejoin, cloudpickle.dumps((main, task))))
        self._rejoin = False
        self._send(base64.b64encode(parcel).decode())

    def finish(self) -> None:
        """End the workers after their current task."""
        self._finishing = True
        self._send("")

    def _send(self, parcel: str) -> None:
        kv.put(f"{self._spec.run}/parcel/{self._parcels}", parcel)
        self._parcels += 1

    def request(self, what: str) -> None:
        if self._channel is not None:
            self._channel.request(what)

    def interrupt(self) -> None:
        if self.key is None:
            return
        if self._training:
            self.request("stop")
        elif not self._finishing:
            self.end(hurry=False)

    def end(self, hurry: bool) -> None:
        """End the workers now: kill the controller, or, without `hurry`, ask it to abort first, in a thread."""
        self._finishing = True
        if hurry:
            self._trainer.end(hurry=lambda: True)
        else:
            self._ending = threading.Thread(target=self._trainer.end, kwargs={"hurry": lambda: False}, daemon=True)
            self._ending.start()

    def join(self, deadline: float) -> None:
        """Wait until no thread of the group uses Ray, at most until `deadline` (monotonic)."""
        for thread in (self._thread, self._ending):
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def poll(self, on_event: Callable[[str, Event], None]) -> TaskOutcome | None:
        """Receive events, and return the outcome of the task if it has ended."""
        if self.key is None:
            return None
        alive = self._thread.is_alive()  # before reading, so that the last events are read
        self._read(on_event)
        reported = len(self._done) + len(self._errors)
        if reported >= self.shape.workers:
            return self._end(self._error() if self._errors else None)
        if not alive:
            if self._finishing and not self._errors and not self._training:
                return self._end(None, interrupted=True)
            outcome = (
                self._outcome if isinstance(self._outcome, BaseException) else RuntimeError("the workers ended early")
            )
            return self._end(ray_train.explain(outcome, self._workers, self._errors))
        if self._failed_at is not None and time.monotonic() - self._failed_at > FOLLOW_SECONDS and not self._finishing:
            error = self._error()
            self.end(hurry=False)
            return self._end(error)
        return None

    def _read(self, on_event: Callable[[str, Event], None]) -> None:
        assert self._channel is not None
        assert self.key is not None
        try:
            events = self._channel.drain()
        except Exception:  # Ray is ending; `fit` reports the reason
            return
        for event in events:
            kind = event["kind"]
            if kind == "worker":
                self._workers[event["rank"]] = event
            elif kind == "done":
                self._done[event["rank"]] = event["result"]
            elif kind == "error":
                self._errors.append(event)
                self._failed_at = self._failed_at or time.monotonic()
            else:
                self._training = self._training or kind == "progress" or event.get("name") == "training"
                on_event(self.key, event)

    def _error(self) -> LaunchError:
        return ray_train.explain(RuntimeError("a worker failed"), self._workers, self._errors)

    def _end(self, error: LaunchError | None, interrupted: bool = False) -> TaskOutcome:
        assert self.key is not None
        assert self._channel is not None
        self._channel.close()
        outcome = TaskOutcome(self.key, None if error else self._done.get(0), error, interrupted)
        self.key, self._channel, self._rejoin = None, None, bool(self._errors)
        if self._errors and self._spec.on_gpu and not self._finishing:
            # An illegal memory access makes the CUDA context unusable, and is not distinguishable from other errors.
            self.finish()
        return outcome


# ---- the workers' side ----------------------------------------------------------------------------------------------


def work(spec: WorkerSpec) -> None:
    """Run tasks on a worker of a group until an empty parcel arrives. The main function of each worker."""
    context = ray_train.own_context()
    # Rank 0 records durations and costs. The driver answers while this process imports modules.
    ahead = WorkerEnd(f"{spec.run}/0", 0, attempt=0).clock_difference() if context.get_world_rank() == 0 else None
    for path in spec.python_path:
        add_calling_directory(path)
    number, joined = 0, contextlib.ExitStack()
    # Before the process group exists: PyTorch defines functions with the current group as a default argument, and this
    # reference would keep its connections open after the rank has left the group.
    importlib.import_module("launcher.engine.entry")
    # Exclude the imported modules from garbage collection, which would take longer than a small task.
    gc.freeze()
    runtime = joined.enter_context(ray_train.joined(spec, context))
    while parcel := wait_for(f"{spec.run}/parcel/{number}", math.inf):
        rejoin, job = cloudpickle.loads(base64.b64decode(parcel))
        if rejoin:
            # After an error the ranks may have stopped in different collectives: they join a new process group.
            _leave(runtime)
            runtime = joined.enter_context(ray_train.joined(replace(spec, run=f"{spec.run}/{number}/again"), context))
        _do(spec, number, job, runtime, ahead)
        number += 1
    with contextlib.suppress(Exception):
        joined.close()


def _do(spec: WorkerSpec, number: int, job: bytes, runtime: Any, ahead: clock.ClockDifference | None) -> None:
    rank = runtime.rank
    with WorkerEnd(f"{spec.run}/{number}", rank, CHANNEL_SECONDS) as control:
        control.emit({"kind": "worker", "rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
        failed = False
        try:
            main, task = cloudpickle.loads(job)
            if ahead is not None:
                clock.convert(task, ahead.seconds())
            result = ray_train.function_of(main)(task, runtime, control)
            runtime.end_task()
            event = {"kind": "done", "rank": rank, "result": result if rank == 0 else None}
        except BaseException as error:
            event, failed = ray_train.describe(error, rank), True
            # The frames refer to the network and its gradients.
            error.__traceback__ = error.__context__ = error.__cause__ = None
        main = task = None
        control.emit(event)
        control.flush()
        if failed and not spec.on_gpu:
            _leave(runtime)  # the other ranks' collectives then fail instead of waiting for this rank
    release_memory(runtime.device)


def _leave(runtime: Any) -> None:
    """Leave the process group, and close its connections."""
    with contextlib.suppress(Exception):
        runtime.end_task()
    runtime.group = runtime.host_group = None  # the connections close with the last reference to them
    gc.collect()
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
