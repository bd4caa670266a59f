"""Clocks of machines that differ: durations and costs of a run do not depend on them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.runners import clock
from launcher.runners.channel import DriverEnd, WorkerEnd
from tests.support.clock_ahead import AHEAD, SITE
from tests.support.command import TOY, Place
from tests.support.waiting import wait_for


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace the key-value store of a Ray cluster by a dictionary."""
    values: dict[str, str] = {}
    monkeypatch.setattr(clock.kv, "put", values.__setitem__)
    monkeypatch.setattr(clock.kv, "get", values.get)
    monkeypatch.setattr(clock.kv, "delete", lambda key: values.pop(key, None))
    monkeypatch.setattr(clock.kv, "keys", lambda prefix: [key for key in sorted(values) if key.startswith(prefix)])
    return values


@pytest.mark.parametrize(("behind", "expected"), [(AHEAD, AHEAD), (-AHEAD, -AHEAD), (0.0, 0.0), (0.2, 0.0)])
def test_the_difference_is_measured(
    store: dict[str, str], monkeypatch: pytest.MonkeyPatch, behind: float, expected: float
) -> None:
    """The driver's clock is behind by `behind` seconds. Other events of the worker reach the driver unchanged."""
    monkeypatch.setattr(clock, "answer", lambda event: store.update({event["key"]: repr(time.time() - behind)}))
    driver, worker = DriverEnd("run"), WorkerEnd("run", 0)
    worker.emit({"kind": "worker"})
    difference = worker.clock_difference()
    events: list[dict] = []

    def is_measured() -> bool:
        events.extend(driver.drain())
        return difference._measured.is_set()

    wait_for(is_measured)
    assert difference.seconds() == pytest.approx(expected, abs=clock.TOLERANCE_SECONDS)
    assert (difference.seconds() == 0.0) == (expected == 0.0)
    assert [event["kind"] for event in events] == ["worker"]


def test_without_an_answer_the_clocks_are_assumed_to_be_equal(
    store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "ANSWER_SECONDS", 0.05)
    assert WorkerEnd("run", 0).clock_difference().seconds() == 0.0


def test_a_clock_that_is_ahead_changes_no_duration_and_no_cost(place: Place, tmp_path: Path) -> None:
    """Otherwise the difference of the clocks is added to the life, the startup and the cost of the run."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    words = ("cluster=local", "cluster.keep_minutes=0", "scaling.workers=2", "scaling.cpus_per_worker=0.5")
    cost = "cluster.node_usd_per_hour=3600"  # one dollar per second
    began = time.monotonic()
    done = place.launch(*TOY, *words, "run.name=a", cost, PYTHONPATH=str(tmp_path / "site"))
    took = time.monotonic() - began
    assert done.status == 0, done.err
    result = place.result("a")
    assert 0 < result["seconds_to_first_step"] <= result["seconds"] <= took
    assert sum(result["phases"].values()) == pytest.approx(result["seconds_to_first_step"], abs=1.0)
    assert result["cost_usd"] == pytest.approx(result["seconds"], abs=0.1)
