"""The position and counters of a run, and the intervals at which it logs, evaluates and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from launcher.config import Interval


@dataclass
class Progress:
    """The position and the counters of a run; saved with every checkpoint.

    Attributes:
        step: number of optimizer steps done.
        epoch, batch: position of the next global batch.
        samples: number of samples used so far, over all workers.
        best_value, best_step: the best value of the monitored tag, and its step.
        world_sizes: the numbers of workers so far, in order.
        restarts: number of restarts after a failure or a stop.
        preemptions: number of restarts after an eviction notice.
        lost_steps: number of steps that were lost in restarts.
        metrics: the last value of every tag.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    best_value: float | None = None
    best_step: int | None = None
    world_sizes: list[int] = field(default_factory=list)
    restarts: int = 0
    preemptions: int = 0
    lost_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def advance(self, samples: int, steps_per_epoch: int) -> None:
        self.step += 1
        self.batch += 1
        self.samples += samples
        if self.batch == steps_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def joined(self, world_size: int) -> None:
        """Record the number of workers that continue from this position."""
        if not self.world_sizes or self.world_sizes[-1] != world_size:
            self.world_sizes.append(world_size)

    def improve(self, value: float, mode: str) -> bool:
        """Record a value of the monitored tag if it is the best so far (`mode`: min or max). Return whether it is."""
        best = self.best_value
        better = best is None or (value < best if mode == "min" else value > best)
        if better and math.isfinite(value):
            self.best_value, self.best_step = value, self.step
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in state.items() if key in known})


@dataclass
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        votes: the number of ranks that raised each flag, see `Runtime.vote`.
        values: the tags to write with this step.
        improved: whether the step has the best value of `checkpoint.monitor` so far.
        reason: the reason for which a callback ends the run, or None.
    """

    votes: dict[str, int]
    values: dict[str, float] = field(default_factory=dict)
    improved: bool = False
    reason: str | None = None


class Every:
    """Determines when a periodic action is due.

    Every rank counts steps and epochs. Only rank 0 measures time, and raises a flag in the vote of the step.
    """

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._last = time.monotonic()

    def due(self, progress: Progress) -> bool:
        """Whether the action is due by steps or epochs, after the step that led to `progress`."""
        if self._interval.steps is not None:
            return progress.step % self._interval.steps == 0
        if self._interval.epochs is not None:
            return progress.batch == 0 and progress.epoch % self._interval.epochs == 0
        return False

    def time_is_up(self) -> bool:
        """Whether the action is due by time. Call it on rank 0, once per step."""
        if self._interval.seconds is None or time.monotonic() - self._last < self._interval.seconds:
            return False
        self._last = time.monotonic()
        return True
