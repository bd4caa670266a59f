"""The cost of a run: counting over its whole life, the budget that stops it, and the messages for both."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher import money
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.pricing.rates import overrides, rate_of
from launcher.config.schema import ClusterConfig, cluster_section
from launcher.errors import ConfigError
from launcher.money import Bill, Meter, Rate
from tests.support.command import TOY, Place
from tests.sweeps.sweep_fixtures import PROJECT as SWEEP_PROJECT

A_SECOND = "cluster.node_usd_per_hour=3600"  # one dollar per second
SLOW = ("+model.delay=0.1", "trainer.epochs=100", "trainer.log_every=1")  # 40 s, unless it is stopped


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "machines", "usd_per_hour"),
    [
        (Rate(2.0), 3, 6.0),
        (Rate(2.0, machines=4), None, 8.0),
        (Rate(2.0, head=0.5), 3, 4.5),  # two nodes and a head
        (Rate(2.0, head=0.5), 1, 2.5),  # the only machine is counted, whether head or node
        (Rate(2.0, head=0.5, share=0.5), 3, 2.25),
    ],
)
def test_the_cost_per_hour_of_existing_machines(rate: Rate, machines: int | None, usd_per_hour: float) -> None:
    assert rate.usd_per_hour(machines) == pytest.approx(usd_per_hour)


def test_each_group_of_workers_continues_the_count() -> None:
    """4 machines for 100 s, then 2 for 50 s, then a failure that the driver records 10 s later."""
    rate, started = Rate(36.0, machines=4), 1000.0
    bill = Bill(seconds=500.0, rate=rate)
    before = {"seconds": 500.0, "cost_usd": 7.0}
    first = bill.meter(before, started, 4)
    assert first.usd(started + 100) == pytest.approx(7.0 + 4.0)
    second = bill.meter({"seconds": 600.0, "cost_usd": 11.0}, started, 2)
    assert second.usd(started + 150) == pytest.approx(11.0 + 1.0)
    assert bill.spent({"seconds": 650.0, "cost_usd": 12.0}, 660.0) == pytest.approx(12.0 + 0.4)


def test_free_machines_keep_the_earlier_cost() -> None:
    assert Bill().meter({"seconds": 5.0, "cost_usd": 3.0}, 0.0, 2).usd() == 3.0
    assert Bill().spent({"cost_usd": 3.0}, 100.0) == 3.0
    assert Bill().meter({}, 0.0, 2).tags() == {}


def test_the_warning_is_given_once() -> None:
    rate = Rate(3600.0, budget=10.0)
    meter = Meter(rate, 1, time.time(), 7.0)
    assert meter.warning() is None
    meter = Meter(rate, 1, time.time() - 1.5, 7.0)
    warning = meter.warning()
    assert warning is not None
    assert "8.50 USD of cluster.budget_usd=10" in warning
    assert "0.025 minutes" in warning
    assert meter.warning() is None
    assert not meter.is_over
    assert Meter(rate, 1, time.time() - 1.5, 8.5).warning() is None, "it was given before the restart"
    assert Meter(rate, 1, time.time() - 1.5, 8.5).is_over


# ---- the rate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({"kind": "local"}, None),
        ({"kind": "existing"}, None),
        ({"kind": "existing", "size": "NC24ads_A100_v4"}, Rate(3.673, 0.192, 3)),
        ({"kind": "existing", "size": "NC24ads_A100_v4", "spot": True}, Rate(0.444, 0.192, 3)),
        # Any node may be created on demand, so the higher price applies.
        ({"kind": "existing", "size": "NC24ads_A100_v4", "spot": "prefer"}, Rate(3.673, 0.192, 3)),
        ({"kind": "existing", "size": "NC24ads_A100_v4", "region": "westeurope"}, None),  # unknown price
        ({"kind": "none", "node_usd_per_hour": 2.0, "budget_usd": 5.0}, Rate(2.0, 0.0, 3, 5.0)),
        ({"kind": "existing", "node_usd_per_hour": 2.0, "head_usd_per_hour": 0.1}, Rate(2.0, 0.1, 3)),
    ],
)
def test_the_rate_of_a_configuration(cluster: dict[str, Any], expected: Rate | None) -> None:
    assert rate_of(cluster_section(cluster), 3, ask=False) == expected


def test_a_budget_needs_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/")
    config = ExistingCluster(size="NC24ads_A100_v4", region="westeurope", budget_usd=5.0)
    with pytest.raises(ConfigError, match=r"The price of .*cluster\.node_usd_per_hour"):
        rate_of(config)


def test_the_overrides_for_a_remote_driver_give_the_same_rate() -> None:
    values = dict(word.removeprefix("cluster.").split("=") for word in overrides(ClusterConfig(), 12.0, machines=4))
    remote = cluster_section({"kind": "existing", **{key: float(value) for key, value in values.items()}})
    assert rate_of(remote, 4) == Rate(3.0, 0.0, 4)
    assert overrides(ClusterConfig()) == []


# ---- runs -----------------------------------------------------------------------------------------------------------


def tags(here: Place, run: str) -> list[float]:
    lines = (here.runs / run / "metrics.jsonl").read_text().splitlines()
    return [entry["cost/usd"] for line in lines if "cost/usd" in (entry := json.loads(line))]


def test_a_budget_stops_a_run_and_a_larger_one_resumes_it(
    here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = tmp_path / "spent"
    monkeypatch.setenv(money.SPENT_VARIABLE, str(spent))
    done = here.here(*TOY, *SLOW, "run.name=a", A_SECOND, "cluster.budget_usd=3")
    assert done.status == 0, done.err
    assert "3600.00 USD/h" in done.err.splitlines()[0]
    warned = [line for line in done.err.splitlines() if "cluster.budget_usd=3" in line]
    assert len(warned) == 1, done.err
    result = here.result("a")
    assert (result["status"], result["reason"]) == ("stopped", "budget")
    assert 3.0 <= result["cost_usd"] < 30.0
    assert result["cost_usd"] == pytest.approx(result["seconds"], abs=0.01)
    assert result["checkpoint"].endswith(f"step-{result['steps']:08d}")
    paid = tags(here, "a")
    assert paid == sorted(paid)
    assert paid[-1] <= result["cost_usd"]
    assert spent.exists(), "the file for the watchdog was not touched"
    assert f"Continue it with: launch run.name=a run.resume=true {money.larger_budget(result['cost_usd'])}" in done.err

    again = here.here("--config-dir", "own", "run.name=a", "run.resume=true")
    assert again.status == 2
    assert '"a" has spent its budget' in again.err
    assert f"cluster.budget_usd={math.ceil(2 * result['cost_usd'])}" in again.err
    assert here.result("a") == result, "a rejected resume has changed the result"

    last = result["steps"] + 3
    more = here.here(
        "--config-dir", "own", "run.name=a", "run.resume=true", "cluster.budget_usd=1000", f"trainer.steps={last}"
    )
    assert more.status == 0, more.err
    later = here.result("a")
    assert (later["status"], later["steps"]) == ("completed", last)
    assert later["cost_usd"] > result["cost_usd"]
    assert later["cost_usd"] == pytest.approx(later["seconds"], abs=0.05)
    listed = here.here("runs")
    assert f"{later['cost_usd']:.2f}" in listed.out


def test_a_failed_run_records_its_cost(here: Place) -> None:
    done = here.here(*TOY, "run.name=a", A_SECOND, "+model.failure=raise", "+model.at=5", "+model.delay=0.1")
    assert done.status == 1
    result = here.result("a")
    assert result["status"] == "failed"
    assert result["cost_usd"] == pytest.approx(result["seconds"], abs=0.01)
    assert result["cost_usd"] > 0.3


def test_without_a_rate_no_cost_is_shown(here: Place) -> None:
    done = here.here(*TOY, "run.name=a")
    assert (done.status, "USD" in done.err) == (0, False)
    assert here.result("a")["cost_usd"] is None
    assert tags(here, "a") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.budget_usd=3"], "needs to know what the machines cost: add cluster.size=SIZE"),
        (["cluster.budget_usd=-1", A_SECOND], "cluster.budget_usd is -1"),
        (["cluster.head_usd_per_hour=1"], "add cluster.node_usd_per_hour=USD"),
        (["cluster.node_usd_per_hour=-2"], "cluster.node_usd_per_hour is -2"),
    ],
)
def test_cost_options_are_validated(here: Place, overrides: list[str], message: str) -> None:
    done = here.here(*TOY, "run.name=a", *overrides)
    assert done.status == 2
    assert message in done.err
    assert not (here.runs / "a").exists()


def test_a_sweep_has_one_budget_for_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SWEEP_PROJECT.parent)
    fixed = ("experiment=line", "cluster=none", f"run.root={tmp_path}", "run.name=s")
    grid = "optimizer.lr=range(0.001,0.4,0.001)"
    launcher.sweep(
        *fixed,
        grid,
        A_SECOND,
        "cluster.budget_usd=3",
        config_dir=SWEEP_PROJECT,
        quiet=True,
    )
    found = json.loads((tmp_path / "s/result.json").read_text())
    assert (found["status"], found["reason"]) == ("stopped", "budget")
    completed = found["trials"].get("completed", 0)  # 0 on a machine that needs 3 s for the first trial
    assert completed < found["trials"]["total"]
    assert found["cost_usd"] >= 3
    for number in range(completed):
        trial = json.loads((tmp_path / f"s/{number}/result.json").read_text())
        assert (trial["status"], trial["reason"]) == ("completed", None)
        assert 0 < trial["cost_usd"] < 3


@pytest.mark.slow
def test_a_restarted_run_counts_each_second_once(here: Place) -> None:
    """A worker is killed at step 6, so two groups of workers train the run."""
    killed = "callbacks.killed={_target_: toy.Accidents, happen: [{rank: 1, step: 6, name: KILL}]}"
    start = time.time()
    words = (
        "cluster=local",
        "scaling.workers=2",
        "scaling.cpus_per_worker=0.5",
        "trainer.epochs=4",
        "trainer.log_every=1",
    )
    done = here.here(*TOY, *words, "+" + killed, "run.name=a", A_SECOND, "checkpoint.every=2")
    took = time.time() - start
    assert done.status == 0, done.err
    result = here.result("a")
    assert (result["status"], result["restarts"]) == ("completed", 1)
    assert result["seconds"] <= took
    assert result["cost_usd"] == pytest.approx(result["seconds"], abs=0.1)
