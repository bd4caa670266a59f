"""The measured speed of the engine, which determines how late a run may leave a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.engine.checkpoint import SavedCheckpoint
from launcher.engine.pace import Pace
from tests.support.engine_ranks import make_job, succeed


def test_ranks_report_the_times_of_steps_saves_and_evaluations(tmp_path: Path) -> None:
    """Values that are too low would miss the deadline of an eviction; saving is the slowest part."""
    job = make_job(model="Slow", steps=12, evaluate_every=4, checkpoint={"every": 2, "keep": 1})
    first, second = succeed(job, tmp_path, 2)
    reports = [event for event in first.events if event["kind"] == "pace"]
    assert not [event for event in second.events if event["kind"] == "pace"]
    assert reports[0]["save_seconds"] is None, "nothing is saved yet, so a reader must not wait"
    assert reports[0]["evaluation_seconds"] == 0
    last = reports[-1]
    assert 0.02 <= last["step_seconds"] < 60
    assert last["evaluation_seconds"] >= 0.1
    assert 0 < last["save_seconds"] < 100


def test_only_changes_are_reported_and_a_slow_save_is_remembered() -> None:
    reports: list[dict[str, Any]] = []
    pace = Pace(reports.append)

    def saved(step: int, seconds: float) -> SavedCheckpoint:
        return SavedCheckpoint(step, Path(), 0, 0.0, seconds)

    pace.update(1.0, None)
    pace.update(1.1, None)
    for step, seconds in enumerate([2.0, 9.0, 2.0, 2.1, 2.0]):
        newest = saved(step, seconds)
        pace.update(1.0, newest)
        pace.update(1.0, newest)  # another log interval before the next save
    assert [event["save_seconds"] for event in reports] == [None, 2.0, 9.0, 2.1]


def test_a_save_takes_until_it_is_on_the_object_store() -> None:
    """Would be wrong: leaving a machine that has the only copy of the newest checkpoint."""
    reports: list[dict[str, Any]] = []
    pace = Pace(reports.append)
    newest = SavedCheckpoint(4, Path(), 0, 0.0, 2.0)
    pace.update(1.0, newest, None)  # nothing has been uploaded yet
    pace.update(1.0, newest, 30.0)
    assert [event["save_seconds"] for event in reports] == [None, 32.0]
