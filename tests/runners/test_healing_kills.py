"""A run that heals in place, on Ray, from which a worker is taken every 15 seconds."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.healing import measure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_cost_a_step_each_and_no_bit(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = measure(kills=20, every=15.0)
    result = outcome.result
    assert result["status"] == "completed"
    assert outcome.same  # every value of every step, and the weights: so every sample was used exactly once
    assert result["samples"] == 50 * result["steps"]
    assert result["restarts"] == 20
    assert result["lost_steps"] <= 20
    assert statistics.median(kill.gap + (kill.joining or 0.0) for kill in outcome.kills) <= 3.0
    assert sum(kill.joining is not None for kill in outcome.kills) >= 15
