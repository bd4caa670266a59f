"""Supervises a run on Ray Train in the driver: handles events and signals, reports restarts, and raises the error."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import ray

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.errors import LaunchError, OutOfMemory, ResourceError, Stopped, TrainingError, WorkerLost, last_line
from launcher.formatting import count
from launcher.ray_seam import kv, private
from launcher.ray_seam.train_controller import ControllerError, WorkerGroupError, WorkerGroupStartupTimeoutError
from launcher.runners import controller_policy, preemption
from launcher.runners.channel import DriverEnd
from launcher.runners.signals import STOPPING, Interrupts
from launcher.runners.worker_errors import Event, crash_of, rebuild

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """The limits of automatic restarts.

    Args:
        max_failures: consecutive restarts without a newer checkpoint.
        min_workers: the smallest number of workers to continue with; None: all workers are required.
        timeout: the time limit of a collective operation, and of a worker's answer, in seconds.
    """

    max_failures: int = 0
    min_workers: int | None = None
    timeout: float = 120.0


NO_RESTARTS = Limits()


class RunningTrainer(Protocol):
    def fit(self) -> Any: ...

    def end(self, hurry: Callable[[], bool]) -> None: ...


class Supervision:
    """Runs a trainer in a thread and supervises it. `watch` returns rank 0's result or raises the error.

    Args:
        make: returns a trainer; it is called again if Ray Train's controller has died.
        channel: receives the events of workers and controller.
        on_event: called with each event for the user.
        interrupts: entered already.
        cluster: entered already.
        limits: the limits of automatic restarts.
    """

    def __init__(
        self,
        make: Callable[[], RunningTrainer],
        channel: DriverEnd,
        on_event: Callable[[Event], None],
        interrupts: Interrupts,
        cluster: EmbeddedRay | ExistingRay,
        limits: Limits,
    ) -> None:
        self.channel = channel
        self._cluster = cluster
        self._make = make
        self._on_event = on_event
        self._interrupts = interrupts
        self._limits = limits
        self._attempt = 1
        self._workers: dict[int, Event] = {}  # rank -> its event `worker`: process, host and node
        self._errors: list[Event] = []
        self._suspects: dict[int, str] = {}
        self._training = False
        self._size = 0  # workers that trained last
        self._controllers_lost = 0
        self._pace: Event | None = None  # of the engine
        # An embedded Ray has only this machine, and is never drained.
        self._evictions = preemption.Evictions(preemption.RayCluster(), self._note) if cluster.existing else None
        self._outcome: Any = None

    def watch(self) -> dict[str, Any]:
        while True:
            self._outcome = None
            self._trainer = self._make()
            self._thread = threading.Thread(target=self._fit, name="launch-fit", daemon=True)
            self._thread.start()
            self._follow()
            if not isinstance(self._outcome, BaseException):
                return self._outcome.return_value
            if not self._replace_controller():
                error = explain(self._outcome, self._workers, self._errors, self._suspects, self._limits)
                if self._attempt > 1:
                    error.exit_status = 1
                raise error from None

    def _follow(self) -> None:
        """Poll events and signals until `fit` has ended."""
        stopping = False
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if dead := self._cluster.dead_process():  # Ray itself would retry for a minute
                raise WorkerLost(
                    f"Ray's process {dead} ended on this machine. It may have been killed because the machine ran out "
                    "of memory. Continue the run from its newest checkpoint with run.resume=true."
                )
            self._read_events()
            self._check_evictions()
            if self._interrupts.count >= 2 or (self._interrupts.count and not self._training):
                self._end()
            if self._interrupts.count and not stopping:
                stopping = True
                self.channel.request("stop")
                self._on_event(STOPPING)
        self._read_events()

    def _note(self, text: str) -> None:
        self._on_event({"kind": "note", "text": text})

    def _check_evictions(self) -> None:
        if self._evictions is None or not self._workers:
            return
        nodes = {worker["node"]: worker["host"] for worker in self._workers.values()}
        request = self._evictions.poll(nodes, self._pace, time.time())
        if request == "regroup":
            self.regroup()
        elif request == "stop":
            self.channel.request("stop")

    def regroup(self) -> None:
        """Request a checkpoint and a restart from the current workers. It does not count as a failure."""
        self.channel.request("regroup", self._attempt)

    def _end(self) -> NoReturn:
        count = self._interrupts.count
        self._trainer.end(hurry=lambda: self._interrupts.count > count)
        self._thread.join(timeout=5)
        raise Stopped(self._interrupts.signal_number or 0)

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer.fit()
        except BaseException as error:
            self._outcome = error

    def _replace_controller(self) -> bool:
        """Prepare a restart if Ray Train's controller has died, and return whether the run may be restarted."""
        died = isinstance(self._outcome, ray.exceptions.RayActorError)
        self._controllers_lost += died
        if not died or self._controllers_lost > self._limits.max_failures or self._interrupts.count:
            return False
        self._free_placement_group()
        kv.put(f"{self.channel.run}/cause", "failure")
        text = (
            "The process that supervises the workers (Ray Train's controller) died. The run restarts from its newest "
            f"checkpoint (restart {self._controllers_lost} of at most {self._limits.max_failures})."
        )
        self._on_event({"kind": "note", "text": text})
        self._reset(self._attempt + 1)
        return True

    def _free_placement_group(self) -> None:
        """Release the resources of the workers. The workers end with the controller, but their reservation does not."""
        key = f"{self.channel.run}/placement_group"
        held = kv.get(key)
        if held:
            with contextlib.suppress(Exception):
                private.free_placement_group(held)

    def _reset(self, attempt: int) -> None:
        self._attempt = attempt
        self._workers, self._errors, self._suspects = {}, [], {}
        self._training = False

    def _read_events(self) -> None:
        """Handle the events of workers and controller."""
        try:
            events = self.channel.drain()
        except Exception:  # Ray is ending; `fit` reports the reason
            return
        for event in events:
            kind = event.get("kind")
            if kind == "worker":
                if event["attempt"] >= self._attempt:
                    self._attempt = event["attempt"]
                    self._workers[event["rank"]] = event
            elif kind == "error":
                if event["attempt"] >= self._attempt:
                    self._errors.append(event)
            elif kind == "verdict":
                self._on_verdict(event)
            elif kind == "pace":
                self._pace = event
            elif kind == "can_grow":
                if event["attempt"] == self._attempt and not self._interrupts.count:
                    self.regroup()
            elif kind == "waiting":
                self._note(waiting_note(event["seconds"]))
            elif kind == "resumed":
                kv.put(f"{self.channel.run}/resumed", str(event["step"]))
            else:
                self._training = self._training or kind == "progress" or event.get("name") == "training"
                self._on_event(event)
        if self._training and self._size != len(self._workers):
            if self._size:
                self._note(size_note(len(self._workers), self._size))
            self._size = len(self._workers)

    def _on_verdict(self, verdict: Event) -> None:
        self._suspects = {int(rank): how for rank, how in verdict["suspects"].items()}
        if not verdict["again"]:
            return
        text = restart_note(verdict, self._suspects, self._workers, self._limits, self._errors)
        self._on_event({"kind": "note", "text": text})
        self._reset(verdict["attempt"] + 1)


# ---- messages -------------------------------------------------------------------------------------------------------


def restart_note(
    verdict: Event, suspects: dict[int, str], workers: dict[int, Event], limits: Limits, errors: Sequence[Event] = ()
) -> str:
    """Return the note about a restart: the cause, and the workers that were lost."""
    if verdict["cause"] == "resize":
        return "Resources for more workers are free. All workers saved a checkpoint and restart with the new workers."
    if verdict["cause"] == "preemption" and not suspects:
        return "All workers saved a checkpoint and restart, because a machine will be evicted."
    messages = [event["error"]["message"].rstrip(".") for event in errors if event.get("lost")]
    what = messages[0] if messages else describe_loss(suspects, workers, limits)
    if verdict["cause"] == "preemption":
        return f"{what}. The run restarts from its newest checkpoint."
    times = f"failure {verdict['count']} of at most {verdict['most']} without a newer checkpoint"
    return f"{what}. The run restarts from its newest checkpoint ({times})."


def waiting_note(seconds: float) -> str:
    """Return the note about a group that waits for free resources."""
    return (
        "Not enough free CPUs or GPUs for the workers: other jobs are using them, or a machine was lost. The run waits "
        f"up to {seconds / 60:g} minutes. With a smaller scaling.min_workers it continues with fewer workers."
    )


def size_note(now: int, before: int) -> str:
    """Return the note about a group with another number of workers than the group before."""
    return f"Training continues with {count(now, 'worker')} instead of {before}."


def describe_loss(suspects: dict[int, str], workers: dict[int, Event], limits: Limits) -> str:
    """Return a sentence about the workers that were lost, without a full stop."""
    if not suspects:
        return "The connection between workers was lost"
    first = min(suspects)
    worker = workers.get(first, {})
    who = f"Worker {first} of {max(len(workers), first + 1)} "
    who += f"(process {worker.get('pid', '?')} on {worker.get('host', '?')})"
    if others := sorted(suspects.keys() - {first}):
        who += f" (and worker {', '.join(map(str, others))})"
    how = suspects[first]
    if how == "memory":
        return f"{who} was killed because its machine ran out of memory"
    if how == "silent":
        return f"{who} did not answer: it hangs, or its machine or network is down"
    if how == "absent":
        return f"{who} did not join a collective operation within {limits.timeout:g} seconds"
    if how == "preempted":
        return f"{who} was on a machine that was evicted"
    if crash := crash_of(worker.get("stderr", "")):
        return f"{who} crashed in native code ({crash})"
    return f"{who} died without an error message. It was killed, perhaps because its machine ran out of memory"


def with_hosts(event: Event, workers: dict[int, Event]) -> Event:
    """Return the event of an error with the host of each rank in its message, if there are several hosts."""
    if len({worker["host"] for worker in workers.values()}) < 2:
        return event
    message = re.sub(
        r"\brank (\d+)\b(?! on )",
        lambda rank: f"{rank[0]} on {workers[int(rank[1])]['host']}" if int(rank[1]) in workers else rank[0],
        event["error"]["message"],
    )
    return {**event, "error": {**event["error"], "message": message}}


def explain(
    outcome: BaseException,
    workers: dict[int, Event],
    errors: list[Event],
    suspects: dict[int, str] | None = None,
    limits: Limits = NO_RESTARTS,
) -> LaunchError:
    """Return the error to report: an error of user code or the engine, else a lost worker, else a consequence of one.

    Args:
        outcome: the exception of `fit`.
        workers: rank -> its event `worker`.
        errors: the events of `worker_errors.describe`.
        suspects: rank -> the kind of loss, for the workers that the controller treats as the cause.
    """
    genuine = [event for event in errors if not event["aftermath"]]
    if genuine:
        return rebuild(with_hosts(min(genuine, key=lambda event: event["time"]), workers))
    suspects = suspects or (
        controller_policy.suspects(outcome.worker_failures) if isinstance(outcome, WorkerGroupError) else {}
    )
    if suspects:
        kind, remedy = WorkerLost, "Continue the run from its newest checkpoint with run.resume=true"
        if "memory" in suspects.values():
            suspects = {rank: how for rank, how in suspects.items() if how == "memory"}
            kind, remedy = (
                OutOfMemory,
                "Lower trainer.microbatch_size, data.num_workers or scaling.workers, and continue from the newest "
                "checkpoint with run.resume=true",
            )
        return kind(f"{describe_loss(suspects, workers, limits)}. {remedy}.")
    if errors:
        return rebuild(min(errors, key=lambda event: event["time"]))
    if isinstance(outcome, ray.exceptions.RayActorError):
        return WorkerLost(
            "The process that supervises the workers (Ray Train's controller) died. It was killed, perhaps because the "
            "machine ran out of memory. Continue the run from its newest checkpoint with run.resume=true."
        )
    cause = outcome.controller_failure if isinstance(outcome, ControllerError) else outcome
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return ResourceError(
            f"Not enough free CPUs or GPUs for {cause.num_workers} workers: other jobs are using them, or a machine "
            "was lost. Lower scaling.workers or scaling.min_workers, or wait until resources are free, and continue "
            "with run.resume=true."
        )
    return TrainingError(
        f"The workers could not be started or supervised: {last_line(cause).rstrip('.')}. Run again with verbose=true "
        "to see Ray's own messages."
    )
