"""Complete sweeps on Ray Train workers: a killed worker, a killed driver, a cluster that grows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_fixtures import HERE, PROJECT, result, table

import launcher
from tests.support.waiting import wait_for


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(HERE)
    return ["experiment=line", f"run.root={tmp_path}", "run.name=s", "logging.tensorboard=false", "checkpoint.every=1"]


@pytest.mark.smoke
def test_a_killed_worker_costs_its_trial_one_retry_from_its_checkpoint(words: list[str], tmp_path: Path) -> None:
    """Would be wrong: a trial that is lost or restarted, other trials that fail, objectives that differ."""
    trouble = ["data.trouble='',kill,ok", "data.at=70", f"data.flag={tmp_path / 'killed'}"]

    found = launcher.sweep(*words, *trouble, config_dir=PROJECT, quiet=True)

    assert (tmp_path / "killed").exists()
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 3
    assert len({trial["objective"] for trial in found["trials"]}) == 1
    restarts = [result(found["directory"], number)["restarts"] for number in range(3)]
    assert restarts == [0, 1, 0]
    assert "It resumes (consecutive failure 1 of at most 3)" in (tmp_path / "s" / "log.txt").read_text()


@pytest.mark.slow
def test_a_sweep_resumes_after_its_driver_and_ray_were_killed(words: list[str], tmp_path: Path) -> None:
    """12 trials, SIGKILL in the middle, resume: 12 completed, none trained twice, equal objectives."""
    swept = ["optimizer.lr=range(0.05,0.65,0.05)", "model.nap=0.01"]
    command = [sys.executable, "-m", "launcher", "-m", "--config-dir", str(PROJECT), *words, *swept]
    driver = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "s" / "5" / "metrics.jsonl").exists, 120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # its Ray ends with it
    done = [n for n in range(6) if result(tmp_path / "s", n)["status"] == "completed"]
    assert len(done) >= 5
    ended = {n: (tmp_path / "s" / str(n) / "metrics.jsonl").stat().st_mtime_ns for n in done}

    again = launcher.sweep(f"run.root={tmp_path}", "run.name=s", "run.resume=true", config_dir=PROJECT, quiet=True)

    assert [row["state"] for row in table(tmp_path / "s")] == ["completed"] * 12
    assert {n: (tmp_path / "s" / str(n) / "metrics.jsonl").stat().st_mtime_ns for n in done} == ended
    alone = [w for w in words if not w.startswith("run.name")]
    whole = launcher.sweep(*alone, "run.name=whole", swept[0], "cluster=none", config_dir=PROJECT, quiet=True)
    # Two workers and one: deterministic mode is bit-identical for any number of workers.
    assert [t["objective"] for t in again["trials"]] == [t["objective"] for t in whole["trials"]]


@pytest.mark.slow
def test_new_groups_start_on_a_cluster_that_grows(words: list[str], tmp_path: Path) -> None:
    """Would be wrong: new CPUs that no group uses."""
    from concurrent.futures import ThreadPoolExecutor

    import ray
    from ray.cluster_utils import Cluster

    more = ["optimizer.lr=range(0.1,0.9,0.1)", "scaling.workers=1", "model.nap=0.05", "trainer.epochs=10"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        with ThreadPoolExecutor() as other:  # Ray starts nodes only in the main thread
            sweep = other.submit(lambda: launcher.sweep(*words, *more, config_dir=PROJECT, quiet=True))
            wait_for((tmp_path / "s" / "1").exists, 120)
            cluster.add_node(num_cpus=2)
            found = sweep.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 8
    assert _most_at_once((tmp_path / "s" / "log.txt").read_text()) == 3


@pytest.mark.slow
def test_sizes_are_swept(words: list[str]) -> None:
    """Would be wrong: a trial of two workers that waits forever behind those of one, or other objectives."""
    found = launcher.sweep(*words, "optimizer.lr=0.1,0.2", "scaling.workers=1,2", config_dir=PROJECT, quiet=True)
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 4
    sizes = [result(found["directory"], number)["workers"] for number in range(4)]
    assert sizes == [1, 1, 2, 2]
    objectives = {trial["optimizer.lr"]: trial["objective"] for trial in found["trials"]}
    assert all(objectives[trial["optimizer.lr"]] == trial["objective"] for trial in found["trials"])


def _most_at_once(log: str) -> int:
    now, most = 0, 0
    for line in log.splitlines():
        found: Any = re.search(r"trial \d+ (begins|completed)", line)
        if found:
            now += 1 if found[1] == "begins" else -1
            most = max(most, now)
    return most
