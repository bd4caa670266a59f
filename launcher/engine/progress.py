"""Where a run stands, and when something is due."""

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

    `step`: optimizer steps done. `epoch`, `batch`: the global batch that comes next. `samples`: used so far, over all
    workers. `best`: value and step of the monitored tag. `world_sizes`: numbers of workers, each in turn.
    `restarts`: how often it was continued after it had died or been stopped; `preemptions`: after an eviction notice.
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
        """Keep the number of workers that continue from here."""
        if not self.world_sizes or self.world_sizes[-1] != world_size:
            self.world_sizes.append(world_size)

    def improve(self, value: float, mode: str) -> bool:
        """Keep a value of the monitored tag where it is the best so far (`mode`: min or max). Returns whether it is."""
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

    `votes`: how many ranks raised each flag, see `Runtime.vote`. `values`: the tags to write with this step.
    `improved`: whether this is the best value of `checkpoint.monitor` so far. `reason`: why a callback ends the run.
    """

    votes: dict[str, int]
    values: dict[str, float] = field(default_factory=dict)
    improved: bool = False
    reason: str | None = None


class Every:
    """Decides when something that happens at intervals is due.

    Every rank knows steps and epochs; rank 0 alone judges the time, and raises a flag in the step's vote.
    """

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._last = time.monotonic()

    def due(self, progress: Progress) -> bool:
        """Whether it is due after the step that led to `progress`, by steps or epochs."""
        if self._interval.steps is not None:
            return progress.step % self._interval.steps == 0
        if self._interval.epochs is not None:
            return progress.batch == 0 and progress.epoch % self._interval.epochs == 0
        return False

    def time_is_up(self) -> bool:
        """Whether it is due by the clock; for rank 0 to ask, once a step."""
        if self._interval.seconds is None or time.monotonic() - self._last < self._interval.seconds:
            return False
        self._last = time.monotonic()
        return True
