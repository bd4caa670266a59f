"""The cost of a run: a rate, which is plain data that is sent with the task, and a meter that applies it.

This module is independent of clusters and prices: `launcher.clusters.pricing.rates` creates the rate. `seconds` and
`cost_usd` of result.json are always counted up to the same moment, so the next group of workers, the next command, or
the driver of a failed run can continue the count from there.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARN_AT = 0.8  # of the budget
BUDGET = "budget"  # result.json's `reason` of a run that stopped because its budget was spent
# The environment variable with the path of a file that such a run touches. The watchdog of the cluster looks for it.
SPENT_VARIABLE = "LAUNCH_BUDGET_SPENT"


@dataclass(frozen=True)
class Rate:
    """The cost of machines per hour, and the budget of a run.

    Attributes:
        node: the cost of a machine with workers, in US dollars per hour.
        head: the cost of an additional machine for the head; 0 if there is none.
        machines: the number of machines, including the head.
        budget: the limit for the whole life of the run, in US dollars; None: no limit.
        share: the fraction of the machines that the run uses, if several runs share them.
    """

    node: float
    head: float = 0.0
    machines: int = 1
    budget: float | None = None
    share: float = 1.0

    def usd_per_hour(self, machines: int | None = None) -> float:
        """Return the cost per hour in US dollars. machines: their number with the head; default: `self.machines`."""
        total = machines or self.machines
        nodes = total - 1 if self.head and total > 1 else total
        return (nodes * self.node + self.head) * self.share

    def over(self, seconds: float, machines: int | None = None) -> float:
        """Return the cost of a time in US dollars."""
        return max(0.0, seconds) / 3600 * self.usd_per_hour(machines)


@dataclass(frozen=True)
class Bill:
    """The state of a run's cost when a command starts or resumes it.

    Attributes:
        seconds: the life of the run so far, in seconds.
        rate: the rate of the machines, or None.
    """

    seconds: float = 0.0
    rate: Rate | None = None

    def meter(self, result: Mapping[str, Any], started: float, machines: int | None = None) -> Meter:
        """Return the meter for a group of workers.

        Args:
            result: the content of result.json when the group starts.
            started: the wall-clock time at which the command started. The time between the last count and now is
                counted as well.
            machines: see `Meter`.
        """
        counted = max(0.0, float(result.get("seconds") or 0.0) - self.seconds)
        return Meter(self.rate, machines, started + counted, result.get("cost_usd"))

    def spent(self, result: Mapping[str, Any], seconds: float) -> float | None:
        """Return `cost_usd` of a run with this life in seconds, from the last count in result.json."""
        before: float | None = result.get("cost_usd")
        if self.rate is None:
            return before
        return round((before or 0.0) + self.rate.over(seconds - float(result.get("seconds") or 0.0)), 6)


class Meter:
    """Counts the cost of a run while a group of workers exists.

    Args:
        rate: the rate of the machines; None if they are free or their price is unknown.
        machines: the number of machines; None: the number in the rate.
        since: the wall-clock time up to which `spent` was counted.
        spent: the cost so far in US dollars, or None.
    """

    def __init__(self, rate: Rate | None, machines: int | None, since: float, spent: float | None) -> None:
        self._rate, self._machines, self._since, self._spent = rate, machines, since, spent
        self._warns = rate is not None and rate.budget is not None and (spent or 0.0) < WARN_AT * rate.budget

    def usd(self, now: float | None = None) -> float | None:
        """Return the cost of the run up to `now` (wall-clock time) in US dollars; None if it is unknown."""
        if self._rate is None:
            return self._spent
        return (self._spent or 0.0) + self._rate.over((now or time.time()) - self._since, self._machines)

    def tags(self) -> dict[str, float]:
        """Return the TensorBoard tag of the cost; empty if it is unknown."""
        usd = self.usd()
        return {} if usd is None else {"cost/usd": usd}

    @property
    def is_over(self) -> bool:
        """Return whether the budget is spent."""
        budget = self._budget
        return budget is not None and (self.usd() or 0.0) >= budget

    def warning(self) -> str | None:
        """Return a warning if most of the budget is spent, else None. Given once, and not again after a restart."""
        budget, usd = self._budget, self.usd() or 0.0
        if not self._warns or budget is None or usd < WARN_AT * budget:
            return None
        self._warns = False
        assert self._rate is not None
        if usd >= budget:
            return f"{usd:,.2f} USD are spent, all of cluster.budget_usd={budget:g}. Saving a checkpoint and stopping."
        left = max(0.0, budget - usd) / max(self._rate.usd_per_hour(self._machines), 1e-12) * 60
        return (
            f"{usd:,.2f} USD of cluster.budget_usd={budget:g} are spent. In {left:.3g} minutes the run saves a "
            "checkpoint and stops."
        )

    @property
    def _budget(self) -> float | None:
        return None if self._rate is None else self._rate.budget


def larger_budget(spent: float) -> str:
    """Return the override that raises the budget, so that a run that has spent it can be resumed."""
    return f"cluster.budget_usd={max(1, math.ceil(2 * spent))}"


def budget_refusal(name: str, spent: float, rate: Rate) -> str:
    """Return the message for a run or sweep that cannot be resumed because its budget is spent.

    Args:
        name: of the run or sweep.
        spent: its cost in US dollars.
        rate: the rate with the budget.
    """
    return (
        f'"{name}" has spent its budget: {spent:,.2f} USD of cluster.budget_usd={rate.budget:g}, and every hour costs '
        f"{rate.usd_per_hour():,.2f}. Continue it with a larger budget, which covers the whole life of the run: "
        f"{larger_budget(spent)}. Or use its checkpoints."
    )


def mark_budget_spent(result: Mapping[str, Any]) -> None:
    """Touch the file that LAUNCH_BUDGET_SPENT names, if the run stopped because its budget is spent."""
    path = os.environ.get(SPENT_VARIABLE)
    if path and result.get("reason") == BUDGET:
        with suppress(OSError):
            Path(path).touch()
