"""The predicted duration of a step, and the advice that a run with several workers prints."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks.namespaces import network, run, why_not
from launcher.engine.advice import Advice
from launcher.engine.cost import Link, predict, predict_rare
from launcher.runs import RunDirectory


def test_advice_names_the_link_the_prediction_and_the_fastest_strategy() -> None:
    slow, fast = Link(1e-3, 12.5e6), Link(1e-5, 10e9)
    steps = {"ddp": predict(0.01, 22e6, 2, slow), "diloco": predict_rare(0.01, 22e6, 2, slow, every=20)}
    line = Advice(slow, steps, "ddp").line()
    assert line is not None
    assert "100 Mbit/s" in line
    assert re.search(r"strategy=ddp: 1\.7670 s .* 99% .*\bdiloco \(diloco 0\.0981 s\)", line)

    assert Advice(fast, {"ddp": predict(0.01, 1e6, 2, fast)}, "ddp").line() is None


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_a_run_over_a_slow_link_prints_advice_and_logs_the_accuracy_of_the_prediction(tmp_path: Path) -> None:
    """Guards against advice for another link, and against measurements that change the state of the run."""
    words = ["model=mlp", "model.width=1000", "trainer.steps=6", "trainer.log_every=3", "scheduler=none"]
    command = [sys.executable, "-m", "launcher", "experiment=mnist", *words, f"run.root={tmp_path}", "run.name=a"]
    with network(2, "100mbit") as hosts:
        printed = run(hosts, command, environment={"PYTHONPATH": os.getcwd()}, folder=Path.cwd())[0]
    values = RunDirectory(tmp_path / "a").result()["metrics"]

    assert "Mbit/s. Predicted with strategy=ddp" in printed
    assert "fastest strategy is diloco" in printed
    assert 0.4 < values["throughput/predicted_ratio"] < 2.5  # other processes share the cores
