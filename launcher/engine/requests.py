"""Collects requests to a run (stop, checkpoint, regroup…), and determines how the run ends.

A request may reach one rank or all of them. Each rank raises its requests as flags of the step's vote (`Runtime.vote`),
so that all ranks act on them after the same step and no rank blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.config import Job, parse_interval
from launcher.engine.callbacks import Callbacks
from launcher.engine.control import CHECKPOINT, PRUNE, REGROUP, STOP, Control, Heartbeat
from launcher.engine.finite import Finite
from launcher.engine.progress import Every
from launcher.engine.runtime import Runtime
from launcher.money import BUDGET


@dataclass(frozen=True)
class Intervals:
    """The intervals of logging, evaluation and saving."""

    log: Every
    evaluate: Every
    save: Every

    @classmethod
    def of(cls, job: Job) -> Intervals:
        """Return the intervals of a job, starting now."""
        return cls(
            Every(parse_interval(job.trainer.log_every, "trainer.log_every")),
            Every(parse_interval(job.trainer.evaluate_every, "trainer.evaluate_every")),
            Every(parse_interval(job.checkpoint.every, "checkpoint.every")),
        )


@dataclass(frozen=True)
class Ending:
    """How a run ends: `status` and `reason` of result.json."""

    status: str = "completed"
    reason: str | None = None


class Requests:
    """Collects the requests of one rank, one set of flags a step.

    Attributes:
        over_budget: returns whether the run's budget is spent. Set it on rank 0, which counts the costs.
    """

    def __init__(
        self,
        control: Control,
        runtime: Runtime,
        heartbeat: Heartbeat,
        callbacks: Callbacks,
        finite: Finite,
        intervals: Intervals,
    ) -> None:
        self._control, self._is_first, self._heartbeat = control, runtime.is_first, heartbeat
        self._callbacks, self._finite, self._intervals = callbacks, finite, intervals
        self.over_budget: Callable[[], bool] = lambda: False

    def flags(self) -> dict[str, bool]:
        """Return the flags that this rank raises in the vote of the next step."""
        requests = self._control.requests()
        first, intervals = self._is_first, self._intervals
        spent = BUDGET in requests or self.over_budget()
        return {
            "overflow": False,  # raised by the strategy of deterministic mode
            "trained": False,
            "gradient": self._finite.gradient_was_bad,
            "bad": False,  # raised by the strategy if this rank's loss is not finite
            "stop": STOP in requests or self._heartbeat.stop_requested or spent,
            "signal": STOP in requests,
            BUDGET: spent,
            "prune": PRUNE in requests,
            "regroup": REGROUP in requests,
            "checkpoint": CHECKPOINT in requests or (first and intervals.save.time_is_up()),
            "callback": self._callbacks.wants_to_stop,
            "log": first and intervals.log.time_is_up(),
            "evaluate": first and intervals.evaluate.time_is_up(),
        }


def ending_of(votes: Mapping[str, int], reason: str | None) -> Ending | None:
    """Return how the run ends after a step with these votes, or None when it continues.

    Args:
        reason: the reason for which a callback ends the run, or None.
    """
    if votes["stop"]:
        return Ending("stopped", next((why for why in ("signal", BUDGET) if votes[why]), "request"))
    if votes["prune"]:
        return Ending("pruned", reason)
    return Ending("completed", reason) if reason else None


def asks_to_save(votes: Mapping[str, int]) -> bool:
    """Whether a request needs a checkpoint of this step."""
    return any(votes[request] for request in ("stop", "regroup", "checkpoint"))
