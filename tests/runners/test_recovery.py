"""Lost workers under Ray Train: the run restarts, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.clusters.capacity import resources
from launcher.engine.checkpoint import load_weights
from tests.support.command import TOY, Place

CPUS = resources()[0]
JOB = (*TOY, "trainer.deterministic=true", "trainer.steps=16", "checkpoint.every=4", "logging.tensorboard=false")


def accidents(*happen: tuple[int, int, str]) -> str:
    each = ", ".join(f"{{rank: {rank}, step: {step}, name: {name}}}" for rank, step, name in happen)
    return f"+callbacks.accidents={{_target_: toy.Accidents, happen: [{each}]}}"


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    first, second = (load_weights(result["checkpoint"]) for result in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow  # tests/faults covers much of it in every run of the suite
def test_killed_workers_are_replaced(place: Place, here: Place) -> None:
    """Guards against: a consequence reported as the cause, a wrong count of steps, another order of samples, and a rank
    that waits for one of an earlier group."""
    words = ("cluster=local", "scaling.workers=2", "model.delay=0.3", accidents((1, 6, "KILL"), (0, 10, "KILL")))
    done = place.launch(*JOB, *words, "run.name=a", seconds=160)
    assert done.status == 0, done.err
    assert here.here(*JOB, "run.name=b").status == 0

    result = place.result("a")
    assert (result["status"], result["steps"], result["world_sizes"]) == ("completed", 16, [2])
    assert (result["restarts"], result["preemptions"]) == (2, 0)
    assert 2 <= result["lost_steps"] < 2 * (4 + 3)  # a save takes up to three steps
    assert same_weights(result, here.result("b"))
    assert re.findall(r"\bWorker (\d of 2) \(\w+ \d+ ", done.err) == ["1 of 2", "0 of 2"]
    assert "Traceback" not in done.err


@pytest.mark.smoke
def test_a_stopped_worker_is_replaced_and_the_group_is_as_large_as_fits(place: Place, here: Place) -> None:
    """Guards against: an endless wait for a process that hangs, and the rejection of four workers on two CPUs with
    `scaling.min_workers=1`."""
    words = ("cluster=local", "scaling.workers=4", "scaling.min_workers=1", f"scaling.cpus_per_worker={CPUS / 2}")
    halted = ("model.delay=0.2", "scaling.timeout=8", accidents((1, 6, "STOP")))
    done = place.launch(*JOB, *words, *halted, "run.name=a", seconds=160)
    assert done.status == 0, done.err
    assert here.here(*JOB, "run.name=b").status == 0

    result = place.result("a")
    assert (result["status"], result["world_sizes"], result["restarts"]) == ("completed", [2], 1)
    assert same_weights(result, here.result("b"))
    assert re.findall(r"\bWorker (\d of 2) \(\w+ \d+ ", done.err) == ["1 of 2"]
    pid = int((place.runs / "a/accident-0").read_text().split()[0])
    assert not Path(f"/proc/{pid}").exists(), "the stopped process is left"
