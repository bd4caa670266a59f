"""Warm groups of Ray Train workers: each takes task after task, and starts, imports and joins only once.

One group is one `fit()` whose workers loop. All ranks of a group wait for the same numbered parcel in the cluster's
key-value store, do it with the process group that they have, give its memory back, and wait for the next number. An
empty parcel ends the group. A task that fails leaves the group usable where every rank has come out of it; where one
hangs or has died, the group ends and the next task gets a new one.
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

from ray import cloudpickle

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.config.calling_directory import add_calling_directory
from launcher.errors import LaunchError
from launcher.ray_seam.trainer import ABORT_SECONDS
from launcher.runners import ray_train
from launcher.runners.channel import DriverEnd, WorkerEnd, publish, wait_for
from launcher.runners.free_capacity import alive_nodes, unreachable
from launcher.runners.ray_train import Event, WorkerSpec
from launcher.runners.tasks import Shape, TaskOutcome, fits

# Pruning is decided by the driver between two evaluations: what it takes to hear and to answer is trained for nothing.
TALK_SECONDS = 0.1
# How long the ranks of a group may take to follow one that has failed, before the group is given up.
FOLLOW_SECONDS = 8.0
LOOK_AGAIN_SECONDS = 2.0  # between two looks at the machines of a cluster
# What all groups may take to end: Ray Train's controller is asked for ten seconds, and is then killed.
END_SECONDS = ABORT_SECONDS + 10.0


class Groups:
    """All groups of one driver.

    Args:
        cluster: entered already.
        on_event: called in the thread that calls `look`, with the key of the task and each of its events.
        most: groups at a time at most.
        main: what each rank calls, see `ray_train.run`.
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
        self._asked = time.monotonic()

    @property
    def running(self) -> set[str]:
        """The keys of the tasks that are under way."""
        return {group.key for group in self._groups if group.key is not None}

    def count(self) -> int:
        return len(self._groups)

    def ready(self, shape: Shape) -> bool:
        """Whether a task of this size can begin now. Idle groups of another size end when they stand in its way."""
        if self._idle(shape) is not None:
            return True
        shapes = [group.shape for group in self._groups]
        if (self._most is None or len(shapes) < self._most) and fits([*shapes, shape], *self._room()):
            return True
        self.release()
        return False

    def submit(self, key: str, task: Any, shape: Shape) -> None:
        """Give the task to a group of its size, or to a new one; `ready` has said that there is room."""
        group = self._idle(shape)
        if group is None:
            group = _Group(shape, list(task.python_path), self._cluster)
            self._groups.append(group)
        group.give(key, self._main, task)

    def _idle(self, shape: Shape) -> _Group | None:
        return next((group for group in self._groups if group.idle and group.shape == shape), None)

    def _room(self) -> tuple[float, float]:
        """CPUs and GPUs that there are now: a cluster that is not ours may grow, and lose machines."""
        if self._cluster.existing and time.monotonic() - self._asked > LOOK_AGAIN_SECONDS:
            nodes = alive_nodes()
            gone = unreachable(nodes)  # Ray believes in them for a minute more
            has = [node["Resources"] for node in nodes if node["NodeID"] not in gone]
            self._available = (sum(each.get("CPU", 0.0) for each in has), sum(each.get("GPU", 0.0) for each in has))
            self._asked = time.monotonic()
        return self._available

    def release(self) -> None:
        """End the groups that have nothing to do."""
        for group in self._groups:
            if group.idle:
                group.finish()

    def look(self) -> list[TaskOutcome]:
        """Take what the workers have sent; return the tasks that have ended."""
        ended = []
        for group in list(self._groups):
            end = group.look(self._on_event)
            if end is not None:
                ended.append(end)
            if group.gone:
                self._groups.remove(group)
        return ended

    def request(self, key: str, what: str) -> None:
        """Ask the ranks of a running task for `what`: "stop", "prune", "checkpoint"."""
        for group in self._groups:
            if group.key == key:
                group.request(what)

    def interrupt(self) -> None:
        """Have every task that trains save and stop, and end those that have not begun."""
        for group in self._groups:
            group.interrupt()

    def close(self) -> None:
        """End all groups at once. A Ray of our own ends right after; another one must get back what was reserved.

        That is waited for: Ray ends the whole process where one of its threads speaks to a Ray that was left.
        """
        for group in self._groups:
            group.end(hurry=not self._cluster.existing)
        if self._cluster.existing:
            deadline = time.monotonic() + END_SECONDS
            for group in self._groups:
                group.join(deadline)
        self._groups = []


class _Group:
    """One `fit()`, seen from the driver."""

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
        self._renew = False
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
        parcel = cloudpickle.dumps((self._renew, cloudpickle.dumps((main, task))))
        self._renew = False
        self._post(base64.b64encode(parcel).decode())

    def finish(self) -> None:
        """Have the workers return when they are through with what they do."""
        self._finishing = True
        self._post("")

    def _post(self, parcel: str) -> None:
        publish(f"{self._spec.run}/parcel/{self._parcels}", parcel)
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
        """End the workers now. In a thread of its own where there is time: the controller is asked first."""
        self._finishing = True
        if hurry:
            self._trainer.end(hurry=lambda: True)
        else:
            self._ending = threading.Thread(target=self._trainer.end, kwargs={"hurry": lambda: False}, daemon=True)
            self._ending.start()

    def join(self, deadline: float) -> None:
        """Wait until nothing of the group speaks to Ray any more, at most until `deadline` (monotonic)."""
        for thread in (self._thread, self._ending):
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def look(self, on_event: Callable[[str, Event], None]) -> TaskOutcome | None:
        if self.key is None:
            return None
        alive = self._thread.is_alive()  # asked before reading: what was sent last is still read
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
        except Exception:  # Ray itself is going down: how it ended is told by `fit`
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
        ended = TaskOutcome(self.key, None if error else self._done.get(0), error, interrupted)
        self.key, self._channel, self._renew = None, None, bool(self._errors)
        if self._errors and self._spec.on_gpu and not self._finishing:
            # An illegal access spoils the CUDA context of the process for good, and cannot be told from other errors.
            self.finish()
        return ended


# ---- the workers' side ----------------------------------------------------------------------------------------------


def work(spec: WorkerSpec) -> None:
    """Everything that one worker of a group does: task after task, until an empty parcel comes."""
    context = ray_train.own_context()
    for path in spec.python_path:
        add_calling_directory(path)
    number, joined = 0, contextlib.ExitStack()
    # Before the process group is there: functions of PyTorch take it as the default of an argument when they are
    # defined, and what they hold would stay open when this rank leaves.
    importlib.import_module("launcher.engine.entry")
    # What was imported stays: to look through it for garbage after every task would take longer than a small task.
    gc.freeze()
    runtime = joined.enter_context(ray_train.joined(spec, context))
    while parcel := wait_for(f"{spec.run}/parcel/{number}", math.inf):
        renew, job = cloudpickle.loads(base64.b64decode(parcel))
        if renew:
            # After an error the ranks may have left the process group at different places: they meet in a new one.
            _leave(runtime)
            runtime = joined.enter_context(ray_train.joined(replace(spec, run=f"{spec.run}/{number}/again"), context))
        _do(spec, number, job, runtime)
        number += 1
    with contextlib.suppress(Exception):
        joined.close()


def _do(spec: WorkerSpec, number: int, job: bytes, runtime: Any) -> None:
    from launcher.engine.hardware import release_memory

    rank = runtime.rank
    with WorkerEnd(f"{spec.run}/{number}", rank, TALK_SECONDS) as control:
        control.emit({"kind": "worker", "rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
        failed = False
        try:
            main, task = cloudpickle.loads(job)
            result = ray_train.function_of(main)(task, runtime, control)
            runtime.end_task()
            event = {"kind": "done", "rank": rank, "result": result if rank == 0 else None}
        except BaseException as error:
            event, failed = ray_train.describe(error, rank), True
            # The frames hold the network and its gradients.
            error.__traceback__ = error.__context__ = error.__cause__ = None
        main = task = None
        control.emit(event)
        control.flush()
        if failed and not spec.on_gpu:
            _leave(runtime)  # the others, who wait for this rank in a collective, are told that it has gone
    release_memory(runtime.device)


def _leave(runtime: Any) -> None:
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        runtime.end_task()
    runtime.group = runtime.host_group = None  # the connections close with the last reference to them
    gc.collect()
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
