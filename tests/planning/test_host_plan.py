"""`launch plan cluster=ssh`: the placement of the workers, recorded facts of the hosts, and assumptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote import registry
from launcher.clusters.remote.shell import Shell, destination
from launcher.clusters.ssh.kind import SshCluster
from launcher.config import compose
from launcher.config.schema import Job
from launcher.errors import ConfigError, ResourceError
from launcher.planning.hosts import HostPlan, make_host_plan
from tests.support.command import TOY, Place

HOSTS = ["10.255.0.1", "10.255.0.2"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan opens no connection")

    monkeypatch.setattr(Shell, "run", never)


def record(*facts: dict[str, Any]) -> None:
    """Record a cluster `ssh` with the hosts above, as `launch up` does."""
    words = [destination(host, None, None, None) for host in HOSTS]
    hosts = [
        {"name": host, "address": host, "ssh": ssh, "state": "lives", **more}
        for host, ssh, more in zip(HOSTS, words, facts, strict=True)
    ]
    registry.save(registry.Head("ssh", "ssh", words[0], "python3", "10.255.0.1:6379", 8265, "/launch", hosts=hosts))


def planned(job: Job, hosts: list[str] | None = None, **scaling: Any) -> HostPlan:
    job.cluster = SshCluster(hosts=HOSTS if hosts is None else hosts)
    for key, value in scaling.items():
        setattr(job.scaling, key, value)
    return make_host_plan(job)


@pytest.fixture
def job() -> Job:
    return compose(["experiment=mnist"]).job


def test_unknown_hosts_are_assumed_to_hold_the_workers(job: Job) -> None:
    plan = planned(job, workers=6, device="cpu")
    assert [seat.workers for seat in plan.seats] == [3, 3]
    assert plan.seats[0].cpus is None
    assert any("10.255.0.1, 10.255.0.2" in note and "3 CPU" in note for note in plan.notes)


def test_a_recorded_cluster_needs_no_hosts_and_no_assumptions(job: Job) -> None:
    record({"cpus": 2, "gpus": 0}, {"cpus": 2, "gpus": 0})
    plan = planned(job, hosts=[], workers=3)
    assert [seat.workers for seat in plan.seats] == [2, 1]
    assert not any("assumes" in note for note in plan.notes)


def test_every_gpu_of_recorded_hosts_has_a_worker(job: Job) -> None:
    record({"cpus": 8, "gpus": 1}, {"cpus": 8, "gpus": 4})
    plan = planned(job, workers="auto")
    assert plan.plan.machines.device == "cuda"
    assert [seat.workers for seat in plan.seats] == [1, 4]


def test_a_host_that_did_not_answer_has_no_workers(job: Job) -> None:
    record({"cpus": 4, "gpus": 0}, {"cpus": None, "gpus": None, "state": "dead"})
    plan = planned(job, workers=2)
    assert [(seat.workers, seat.usable) for seat in plan.seats] == [(2, True), (0, False)]


def test_too_many_workers_for_recorded_hosts_are_rejected(job: Job) -> None:
    record({"cpus": 2, "gpus": 0}, {"cpus": 2, "gpus": 0})
    with pytest.raises(ResourceError, match=r"scaling\.workers=4"):
        planned(job, workers=5)


def test_missing_hosts_are_reported(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.hosts="):
        planned(job, hosts=[])


def test_the_command_prints_text_and_json(here: Place) -> None:
    words = ["plan", *TOY, "cluster=ssh", f"cluster.hosts=[{','.join(HOSTS)}]", "scaling.workers=2"]
    planned_text = here.here(*words)
    assert planned_text.status == 0, planned_text.err
    assert "`launch up`" in " ".join(planned_text.out.split())
    facts = json.loads(here.here(*words, "--json").out)
    assert [host["workers"] for host in facts["hosts"]] == [1, 1]
    assert facts["batches"]["per_worker"] > 0
    assert facts["usd_per_hour"] is None
    assert facts["notes"]
    assert not here.runs.exists()
