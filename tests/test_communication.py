"""benchmarks/communication.py: steps to a target, the table, and one slow test over a limited link."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.communication import measure, steps_to, table
from benchmarks.namespaces import why_not


def row(system: str, seed: int, steps: int | None, seconds: float | None, rate: str = "1gbit") -> dict[str, Any]:
    return {"rate": rate, "system": system, "seed": seed, "steps": steps, "seconds": seconds}


def test_the_first_evaluation_at_the_target_counts() -> None:
    losses = {"5": 0.9, "10": 0.4, "15": 0.5, "20": 0.3}
    assert [steps_to(losses, target) for target in (1.0, 0.4, 0.35, 0.1)] == [5, 10, 20, None]


def test_ratios_are_computed_per_seed_and_compared_with_the_demand() -> None:
    rows = [row("ddp", seed, 150, 40.0 + seed) for seed in range(3)]
    rows += [row("diloco", seed, 165, (40.0 + seed) / 4) for seed in range(3)]
    rows += [row("ddp, bf16", seed, 150, (40.0 + seed) / 1.2) for seed in range(3)]
    text, met = table(rows, ["ddp", "diloco", "ddp, bf16"], ["1gbit"])
    lines = text.splitlines()
    assert "1.10 (1.10 … 1.10) | 4.00 (4.00 … 4.00) | ≥ 3: met |" in lines[3]
    assert "≥ 1.4: NOT met" in lines[4]
    assert not met
    assert table(rows, ["ddp", "diloco"], ["1gbit"])[1]


def test_a_target_that_is_not_reached_is_not_met() -> None:
    rows = [row("ddp", 0, 150, 40.0), row("diloco", 0, None, None)]
    text, met = table(rows, ["ddp", "diloco"], ["1gbit"])
    assert "the target was not reached" in text
    assert not met


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_run_over_a_link_waits_for_it() -> None:
    # 22 MB of gradients at 100 Mbit/s take 1.8 s in every step; workers that synchronize after 20 steps rarely wait.
    plain = measure("ddp", 0, 6, "100mbit", 0, 1e-3)["seconds"]
    apart = measure("diloco", 0, 18, "100mbit", 0, 1e-3)["seconds"]
    assert min(plain[2:]) > 1.5
    assert sorted(apart)[len(apart) // 2] < 1.0
