"""What the machines of a run cost: a rate in plain data that travels with the task, and a meter that applies it.

Free of clusters and prices: `launcher.clusters.pricing.rates` makes the rate. The time of a run and its dollars are
counted up to the same moment, `seconds` and `cost_usd` of result.json, so that whoever continues the count (the next
group of workers, the next command, the driver of a run that failed) finds both there.
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
BUDGET = "budget"  # the reason of a run that stopped for it
# Names a file that is touched when a run has stopped for its budget: whoever owns the machines looks for it.
SPENT_VARIABLE = "LAUNCH_BUDGET_SPENT"


@dataclass(frozen=True)
class Rate:
    """What an hour costs, and how much may be spent.

    Attributes:
        node: US dollars an hour of a machine with workers.
        head: of one beside them that leads and does nothing else; 0 where there is none.
        machines: how many there are in all, for whoever cannot count them.
        budget: US dollars over the whole life of the run.
        share: the part of the machines that this run has, of several at a time.
    """

    node: float
    head: float = 0.0
    machines: int = 1
    budget: float | None = None
    share: float = 1.0

    def usd_per_hour(self, machines: int | None = None) -> float:
        """Return US dollars an hour with so many machines, the head among them where there is one."""
        there = machines or self.machines
        nodes = there - 1 if self.head and there > 1 else there
        return (nodes * self.node + self.head) * self.share

    def over(self, seconds: float, machines: int | None = None) -> float:
        """Return the US dollars of a time."""
        return max(0.0, seconds) / 3600 * self.usd_per_hour(machines)


@dataclass(frozen=True)
class Bill:
    """What a run brings along when a command begins to work on it. seconds: of its life so far."""

    seconds: float = 0.0
    rate: Rate | None = None

    def meter(self, result: Mapping[str, Any], started: float, machines: int | None = None) -> Meter:
        """Return the meter of a group of workers.

        Args:
            result: the run's result.json as the group finds it.
            started: wall-clock time of the command. What lies between the last count and now counts as well.
        """
        counted = max(0.0, float(result.get("seconds") or 0.0) - self.seconds)
        return Meter(self.rate, machines, started + counted, result.get("cost_usd"))

    def spent(self, result: Mapping[str, Any], seconds: float) -> float | None:
        """Return `cost_usd` of a run of so many seconds, from what was counted last."""
        before: float | None = result.get("cost_usd")
        if self.rate is None:
            return before
        return round((before or 0.0) + self.rate.over(seconds - float(result.get("seconds") or 0.0)), 6)


class Meter:
    """Counts dollars while a group of workers is there.

    Args:
        rate: None where the machines cost nothing, or nobody knows what.
        machines: how many there are; None for as many as the rate says.
        since: wall-clock time up to which `spent` was counted.
    """

    def __init__(self, rate: Rate | None, machines: int | None, since: float, spent: float | None) -> None:
        self._rate, self._machines, self._since, self._spent = rate, machines, since, spent
        self._warns = rate is not None and rate.budget is not None and (spent or 0.0) < WARN_AT * rate.budget

    def usd(self, now: float | None = None) -> float | None:
        """Return what the run has cost by now; None where that is not known."""
        if self._rate is None:
            return self._spent
        return (self._spent or 0.0) + self._rate.over((now or time.time()) - self._since, self._machines)

    def tags(self) -> dict[str, float]:
        usd = self.usd()
        return {} if usd is None else {"cost/usd": usd}

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        budget = self._budget
        return budget is not None and (self.usd() or 0.0) >= budget

    def warning(self) -> str | None:
        """Return what has to be said when most of the budget is spent: once, and not again after a restart."""
        budget, usd = self._budget, self.usd() or 0.0
        if not self._warns or budget is None or usd < WARN_AT * budget:
            return None
        self._warns = False
        assert self._rate is not None
        if usd >= budget:
            return f"{usd:,.2f} USD are spent, all of cluster.budget_usd={budget:g}: what runs saves and stops."
        left = max(0.0, budget - usd) / max(self._rate.usd_per_hour(self._machines), 1e-12) * 60
        return (
            f"{usd:,.2f} USD of cluster.budget_usd={budget:g} are spent: in {left:.3g} minutes what runs saves a "
            "checkpoint and stops."
        )

    @property
    def _budget(self) -> float | None:
        return None if self._rate is None else self._rate.budget


def larger_budget(spent: float) -> str:
    """Return a word that lets a run go on that has spent its budget."""
    return f"cluster.budget_usd={max(1, math.ceil(2 * spent))}"


def budget_refusal(name: str, spent: float, rate: Rate) -> str:
    """Return why a run, or a sweep, is not continued. spent: what it has cost."""
    return (
        f'"{name}" has spent its budget: {spent:,.2f} USD of cluster.budget_usd={rate.budget:g}, and every hour costs '
        f"{rate.usd_per_hour():,.2f}. Continue it with a larger budget, which covers the whole life of the run: "
        f"{larger_budget(spent)}. Or use its checkpoints."
    )


def mark_budget_spent(result: Mapping[str, Any]) -> None:
    """Where a run has stopped for its budget, touch the file that LAUNCH_BUDGET_SPENT names, if it does."""
    path = os.environ.get(SPENT_VARIABLE)
    if path and result.get("reason") == BUDGET:
        with suppress(OSError):
            Path(path).touch()
