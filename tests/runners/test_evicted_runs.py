"""Eviction notices, from a metadata service through the agent, Ray and the driver to the engine.

The nodes are processes on this machine. One of three is free, so that the number of workers does not change.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Place
from tests.support.engine_ranks import assert_same_weights, final_weights

DRIVE = Path(__file__).with_name("eviction_drive.py")
ROOT = DRIVE.parents[2]
# The same network, slowed down for the disturbed run.
SLOW = """
import time
from models.vision import ConvNet

class Slow(ConvNet):
    def training_step(self, batch):
        time.sleep(0.15)
        return super().training_step(batch)
"""
JOB = ["experiment=mnist_tiny", "data.limit=1000", "trainer.deterministic=true", "logging.tensorboard=false"]
ON_RAY = ["scaling.workers=2", "scaling.cpus_per_worker=1", "checkpoint.every=2", "model._target_=slow.Slow"]

# The row "eviction notice of 3 s" of tests/faults covers an eviction in every run of the suite.
pytestmark = pytest.mark.slow


def evicted(how: str, directory: Path) -> tuple[dict[str, Any], str]:
    """Train while a node is evicted; return the driver's result and the output for the user."""
    (directory / "slow.py").write_text(SLOW)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(DRIVE), "3", how, *JOB, *ON_RAY]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def undisturbed(here: Place) -> Path:
    """Train the job in this process, and return the directory of the run."""
    assert here.here(*JOB, "cluster=none", "scaling.device=cpu", "run.name=calm").status == 0
    return here.runs / "calm"


@pytest.mark.parametrize("how", ["azure:7", "azure:2", "sigterm:7"])
def test_a_run_leaves_a_node_before_its_eviction(how: str, tmp_path: Path, undisturbed: Path) -> None:
    """No step is lost, no worker is placed on the node again, and the weights are bit-identical."""
    found, shown = evicted(how, tmp_path)
    result = found["result"]
    assert result["status"] == "completed"
    assert result["preemptions"] == 1
    assert result["restarts"] == 0
    assert result["lost_steps"] <= 1
    assert len(found["lost"]) == 1
    assert shown.count(f"{found['lost'][0]} will be evicted") == 1
    assert_same_weights(final_weights(tmp_path / "runs/evicted"), final_weights(undisturbed))


def test_a_withdrawn_notice_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    found, shown = evicted("withdrawn:9", tmp_path)
    result = found["result"]
    assert result["status"] == "completed"
    assert (result["preemptions"], result["restarts"], result["lost_steps"]) == (0, 0, 0)
    assert found["lost"] == [], "a node was drained, which cannot be undone"
    assert "was withdrawn" in shown
    assert_same_weights(final_weights(tmp_path / "runs/evicted"), final_weights(undisturbed))
