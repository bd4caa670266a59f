"""One run on Ray Train, seen from the driver: events, signals, what is told of a loss, and the error at the end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import ray

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.errors import LaunchError, OutOfMemory, ResourceError, Stopped, TrainingError, WorkerLost
from launcher.ray_seam import kv, private
from launcher.ray_seam.train_controller import ControllerError, WorkerGroupError, WorkerGroupStartupTimeoutError
from launcher.runners import controller_policy, preemption
from launcher.runners.channel import DriverEnd, publish
from launcher.runners.signals import STOPPING, Interrupts
from launcher.runners.worker_errors import Event, crash_of, rebuild

LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """How far a run helps itself.

    Args:
        max_failures: restarts in a row, without a newer checkpoint between them.
        min_workers: with how few workers it goes on; None: with all alone.
        timeout: seconds that a collective operation may take, and a worker may be silent.
    """

    max_failures: int = 0
    min_workers: int | None = None
    timeout: float = 120.0


NEVER_AGAIN = Limits()


class RunningTrainer(Protocol):
    def fit(self) -> Any: ...

    def end(self, hurry: Callable[[], bool]) -> None: ...


class Supervision:
    """`watch` returns rank 0's result or raises what went wrong.

    Args:
        make: returns a trainer; called again where Ray Train's controller has died.
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
        self._workers: dict[int, Event] = {}  # by rank: who and where it is
        self._errors: list[Event] = []
        self._suspects: dict[int, str] = {}
        self._training = False
        self._controllers_lost = 0
        self._pace: Event | None = None  # of the engine
        # Nobody drains a Ray of our own: its only machine is this one.
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
        """Look five times a second until `fit` has ended."""
        stopping = False
        while self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
            if dead := self._cluster.dead_process():  # Ray itself would try for a minute to reach it
                raise WorkerLost(
                    f"Ray's own process {dead} ended on this machine; it was killed, perhaps by the kernel for want of "
                    "memory. Continue the run from its newest checkpoint with run.resume=true."
                )
            self._look()
            self._look_for_evictions()
            if self._interrupts.count >= 2 or (self._interrupts.count and not self._training):
                self._end()
            if self._interrupts.count and not stopping:
                stopping = True
                self.channel.request("stop")
                self._on_event(STOPPING)
        self._look()

    def _note(self, text: str) -> None:
        self._on_event({"kind": "note", "text": text})

    def _look_for_evictions(self) -> None:
        if self._evictions is None or not self._workers:
            return
        nodes = {worker["node"]: worker["host"] for worker in self._workers.values()}
        asked = self._evictions.look(nodes, self._pace, time.time())
        if asked == "regroup":
            self.regroup()
        elif asked == "stop":
            self.channel.request("stop")

    def regroup(self) -> None:
        """Have the workers that there are now save and be started again, which counts as no failure."""
        self.channel.request("regroup", self._attempt)

    def _end(self) -> NoReturn:
        seen = self._interrupts.count
        self._trainer.end(hurry=lambda: self._interrupts.count > seen)
        self._thread.join(timeout=5)
        raise Stopped(self._interrupts.signal_number or 0)

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer.fit()
        except BaseException as error:
            self._outcome = error

    def _replace_controller(self) -> bool:
        """Whether Ray Train's controller has died, another may take over, and nothing of the old one is in its way."""
        died = isinstance(self._outcome, ray.exceptions.RayActorError)
        self._controllers_lost += died
        if not died or self._controllers_lost > self._limits.max_failures or self._interrupts.count:
            return False
        self._free_placement_group()
        publish(f"{self.channel.run}/cause", "failure")
        text = (
            "The process that supervises the workers (Ray Train's controller) died. The run is started again from its "
            f"newest checkpoint ({self._controllers_lost} of at most {self._limits.max_failures} times)."
        )
        self._on_event({"kind": "note", "text": text})
        self._begin_again(self._attempt + 1)
        return True

    def _free_placement_group(self) -> None:
        """Give back what was reserved for the workers: they end with the controller, the reservation does not."""
        key = f"{self.channel.run}/placement_group"
        held = kv.get(key)
        if held:
            with contextlib.suppress(Exception):
                private.free_placement_group(held)

    def _begin_again(self, attempt: int) -> None:
        self._attempt = attempt
        self._workers, self._errors, self._suspects = {}, [], {}
        self._training = False

    def _look(self) -> None:
        """Take what the workers and the controller have sent."""
        try:
            events = self.channel.drain()
        except Exception:  # Ray itself is going down: how it ended is told by `fit`
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
                self._take_verdict(event)
            elif kind == "pace":
                self._pace = event
            elif kind == "room":
                if event["attempt"] == self._attempt and not self._interrupts.count:
                    self.regroup()
            elif kind == "waiting":
                self._note(waiting(event["seconds"]))
            elif kind == "resumed":
                publish(f"{self.channel.run}/resumed", str(event["step"]))
            else:
                self._training = self._training or kind == "progress" or event.get("name") == "training"
                self._on_event(event)

    def _take_verdict(self, verdict: Event) -> None:
        self._suspects = {int(rank): how for rank, how in verdict["suspects"].items()}
        if not verdict["again"]:
            return
        text = again(verdict, self._suspects, self._workers, self._limits, self._errors)
        self._on_event({"kind": "note", "text": text})
        self._begin_again(verdict["attempt"] + 1)


# ---- what is told ---------------------------------------------------------------------------------------------------


def again(
    verdict: Event, suspects: dict[int, str], workers: dict[int, Event], limits: Limits, errors: Sequence[Event] = ()
) -> str:
    """Return the line that tells who was lost and that the run is started again."""
    if verdict["cause"] == "resize":
        return "There is room for more workers: all have saved, and start again with them."
    if verdict["cause"] == "preemption" and not suspects:
        return "All workers have saved and start again, since a machine is to be taken away."
    said = [event["error"]["message"].rstrip(".") for event in errors if event.get("lost")]
    what = said[0] if said else what_happened(suspects, workers, limits)
    if verdict["cause"] == "preemption":
        return f"{what}. The run is started again from its newest checkpoint."
    times = f"failure {verdict['count']}, of at most {verdict['most']} in a row without a newer checkpoint"
    return f"{what}. The run is started again from its newest checkpoint ({times})."


def waiting(seconds: float) -> str:
    """Return the line that tells that there is no room for a group."""
    return (
        f"There is no room for the workers now: what they need is held by other work, or its machine is gone. The run "
        f"waits up to {seconds / 60:g} minutes for it; with a smaller scaling.min_workers it goes on with fewer."
    )


def what_happened(suspects: dict[int, str], workers: dict[int, Event], limits: Limits) -> str:
    """Return who was lost, and how, without a full stop."""
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
        return f"{who} was ended because the memory of the machine was nearly used up"
    if how == "silent":
        return f"{who} did not answer for some time: it is halted, or its machine or the network to it is gone"
    if how == "absent":
        return f"{who} did not take part in an operation of all workers within {limits.timeout:g} seconds"
    if how == "preempted":
        return f"{who} was on a machine that was taken away"
    if crash := crash_of(worker.get("stderr", "")):
        return f"{who} crashed in native code ({crash})"
    return f"{who} died without a word: it was killed, by somebody or by the kernel for want of memory"


def explain(
    outcome: BaseException,
    workers: dict[int, Event],
    errors: list[Event],
    suspects: dict[int, str] | None = None,
    limits: Limits = NEVER_AGAIN,
) -> LaunchError:
    """Return the error to tell: a genuine one before a lost worker, and that before what followed from either.

    Args:
        outcome: what `fit` raised.
        workers: by rank, who and where it was.
        errors: what the workers have said, see `describe`.
        suspects: by rank, how those were lost that the controller holds to be the cause.
    """
    genuine = [event for event in errors if not event["aftermath"]]
    if genuine:
        return rebuild(min(genuine, key=lambda event: event["time"]))
    suspects = suspects or (
        controller_policy.suspects(outcome.worker_failures) if isinstance(outcome, WorkerGroupError) else {}
    )
    if suspects:
        kind, cure = WorkerLost, "Continue the run from its newest checkpoint with run.resume=true"
        if "memory" in suspects.values():
            suspects = {rank: how for rank, how in suspects.items() if how == "memory"}
            kind, cure = (
                OutOfMemory,
                "Lower trainer.microbatch_size, data.num_workers or scaling.workers, and continue from the newest "
                "checkpoint with run.resume=true",
            )
        return kind(f"{what_happened(suspects, workers, limits)}. {cure}.")
    if errors:
        return rebuild(min(errors, key=lambda event: event["time"]))
    if isinstance(outcome, ray.exceptions.RayActorError):
        return WorkerLost(
            "The process that supervises the workers (Ray Train's controller) died: it was killed, by somebody or by "
            "the kernel for want of memory. Continue the run from its newest checkpoint with run.resume=true."
        )
    cause = outcome.controller_failure if isinstance(outcome, ControllerError) else outcome
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return ResourceError(
            f"{cause.num_workers} workers were asked for, and Ray did not find room for them in time: other work "
            "holds its CPUs or GPUs, or a machine is gone. Lower scaling.workers or scaling.min_workers, or wait until "
            "there is room, and continue with run.resume=true."
        )
    last_line = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
    return TrainingError(
        f"The workers could not be started or supervised: {last_line.rstrip('.')}. Run again with verbose=true to "
        "see Ray's own messages."
    )
