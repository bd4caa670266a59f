"""Runs on a real Slurm: a controller and two nodes on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.clusters.conformance import Harness, Reference, check, check_requests, record
from tests.clusters.slurm.lab import SlurmLab, slurm
from tests.support.command import PROJECT
from tests.support.waiting import wait_for

__all__ = ["slurm"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
JOB = ("--config-dir", "own", "experiment=toy", "trainer.deterministic=true")
LONG = ("trainer.steps=1000000", "checkpoint.every=1000", "trainer.log_every=50")
STEPS = ("trainer.steps=1500", "trainer.log_every=100", "trainer.evaluate_every=500", "run.name=requeued")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp("reference") / "project"
    shutil.copytree(PROJECT, directory)
    home = {"HOME": str(directory / "home")}
    return record(Harness(["cluster=none"], [], directory, JOB, LONG, ("data.bad=15",), environment=home))


@pytest.fixture
def harness(slurm: SlurmLab, tmp_path: Path) -> Harness:
    directory = tmp_path / "project"
    shutil.copytree(PROJECT, directory)
    words = ["cluster=slurm", "cluster.nodes=2", "scaling.workers=2"]
    rejected = [["cluster.partition=nope"], ["cluster.gres=gpu:1"], ["cluster.constraint=nope"], ["cluster.nodes=9"]]
    rejected.append(["cluster.time_limit=0:30"])
    environment = {**slurm.environment, "HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state")}
    made = Harness(
        words, rejected, directory, JOB, LONG, ("data.bad=15",), environment, left=slurm.marked, seconds=1200
    )
    return made


def test_requests_are_validated_by_slurm(slurm: SlurmLab, harness: Harness) -> None:
    check_requests(harness)
    assert slurm.ask("squeue", "--noheader", "--states=all") == "", "a rejected request submitted a job"
    gone = replace(harness, bad=[[]], environment={**harness.environment, "SLURM_CONF": "/nonexistent"})
    done = gone.launch("train", *JOB, *gone.words, "run.name=refused")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr


def test_two_nodes_conform(harness: Harness, reference: Reference) -> None:
    """The logged values, results and exit statuses are those of one process, and nothing is left."""
    check(harness, reference)


def test_a_job_with_the_notice_of_its_time_limit_is_queued_again(slurm: SlurmLab, harness: Harness) -> None:
    """Slurm gives the notice by a signal, which is sent here instead of waiting for minutes."""
    metrics = harness.directory / "runs/requeued/metrics.jsonl"
    process = harness.start("train", *JOB, *harness.words, *STEPS, "cluster.requeue=true", "cluster.time_limit=50")
    wait_for(lambda: process.poll() is not None or (metrics.is_file() and metrics.stat().st_size), 300)
    job = slurm.ask("squeue", "--noheader", "--states=RUNNING", "--format=%A").strip()
    slurm.ask("scancel", "--signal=USR1", job)
    assert process.wait(timeout=1200) == 0
    shown = slurm.ask("scontrol", "show", "job", job)
    assert "Restarts=1" in shown, shown
    (output,) = harness.directory.parent.rglob("output.txt")
    started = [
        line for line in output.read_text().splitlines() if line.startswith("requeued: 2 CPU workers (the existing")
    ]
    assert len(started) == 2, output.read_text()
    found = _state(harness, "requeued")
    undisturbed = replace(harness, directory=harness.directory.parent / "alone", words=["cluster=none"])
    shutil.copytree(PROJECT, undisturbed.directory)
    assert undisturbed.launch("train", *JOB, *undisturbed.words, *STEPS).returncode == 0
    assert found == _state(undisturbed, "requeued")


def _state(harness: Harness, name: str) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Return the result of a run with a digest of its last weights, and the values that it logged."""
    directory = harness.directory / "runs" / name
    result = json.loads((directory / "result.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    values = [{key: row[key] for key in row if key == "step" or key.startswith(("train/", "val/"))} for row in rows]
    last = sorted((directory / "checkpoints").glob("step-*"))[-1]
    weights = hashlib.sha256((last / "data-00000.bin").read_bytes()).hexdigest()
    return {key: result[key] for key in ("status", "steps", "samples", "lost_steps")} | {"weights": weights}, values
