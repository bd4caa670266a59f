"""Estimates cost and duration of an acceptance run from `launch plan --json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Not measured on Azure: these are estimates of the stages, and limit nothing. The budget does.
UP_MINUTES, CHECK_MINUTES, EVICTION_MINUTES, DOWN_MINUTES = 20.0, 5.0, 10.0, 8.0


@dataclass(frozen=True)
class Estimate:
    """Rates in US dollars per hour; `minutes` is the expected duration of the whole run."""

    usd_per_hour: float
    node_usd_per_hour: float
    budget_usd: float
    minutes: float
    seconds_per_step: float | None
    prices_from: str

    @property
    def usd(self) -> float:
        return self.usd_per_hour * self.minutes / 60

    @property
    def limit_minutes(self) -> float:
        """Return the number of minutes after which the budget is spent."""
        return self.budget_usd / self.usd_per_hour * 60

    def text(self) -> str:
        return (
            f"{self.usd_per_hour:.2f} USD an hour for two nodes and the head; about {self.minutes:.0f} minutes, so "
            f"about {self.usd:.2f} USD of a budget of {self.budget_usd:.2f} USD, which lasts for "
            f"{self.limit_minutes:.0f} minutes ({self.prices_from})"
        )


def estimate(plan: dict[str, Any], train_minutes: float, idle_minutes: float) -> Estimate:
    """Raises ValueError with the reason if the plan does not allow the run."""
    rate, budget = plan.get("usd_per_hour"), (plan.get("budget") or {}).get("usd")
    if not budget:
        raise ValueError("No budget is set. Set cluster.budget_usd, such as cluster.budget_usd=5.")
    if not rate:
        raise ValueError(
            f"The price of these nodes is not known: {' '.join(plan.get('notes') or [])} Set cluster.node_usd_per_hour "
            "and cluster.head_usd_per_hour, or choose another cluster.size or cluster.region."
        )
    minutes = UP_MINUTES + CHECK_MINUTES + train_minutes + EVICTION_MINUTES + idle_minutes + 3 + DOWN_MINUTES
    nodes = plan["nodes"]
    found = Estimate(
        rate,
        plan["nodes_usd_per_hour"] / nodes["count"],
        budget,
        minutes,
        plan.get("seconds_per_step"),
        plan.get("prices_from") or "prices of the plan",
    )
    if found.usd > budget:
        raise ValueError(
            f"The run is expected to cost {found.usd:.2f} USD, more than cluster.budget_usd={budget:g}. Raise the "
            "budget, choose a smaller cluster.size, or fewer --minutes."
        )
    return found
