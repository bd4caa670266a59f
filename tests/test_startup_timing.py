"""The phases of the start: result.json contains the time before the first step, by phase."""

from __future__ import annotations

import pytest

from launcher.startup_timing import Marks, describe
from tests.support.command import TOY, Place


def test_phases_add_up_even_with_a_clock_that_lags_behind() -> None:
    marks = Marks()
    for phase, at in (("configuration", 10.0), ("check", 11.5), ("workers", 12.0), ("data", 11.9), ("data", 14.0)):
        marks.begin(phase, at)

    assert marks.seconds(15.0) == {"configuration": 1.5, "check": 0.5, "workers": 0.0, "data": 3.1}


def test_a_run_records_the_phases_before_its_first_step(here: Place) -> None:
    done = here.here(*TOY, "run.name=a", "cluster=none", "verbose=true")

    result = here.result("a")
    phases = result["phases"]
    assert list(phases) == ["configuration", "imports", "check", "data", "model", "first_step"]
    assert sum(phases.values()) == pytest.approx(result["seconds_to_first_step"], abs=0.02)
    assert describe(phases) in done.err
