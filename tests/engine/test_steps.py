"""A `training_step` with a second parameter gets the position of the run: step, epoch, length, rank, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launcher.engine import checkpoint
from launcher.engine.estimate import estimate
from launcher.errors import ConfigError
from tests.engine.test_start_check import refused, toy_job
from tests.support import engine_toys as toys
from tests.support.engine_ranks import Script, close, final_weights, logged, make_job, succeed

MODEL = {"_target_": "Annealed", "note": True}


def steps_of(rank: Any) -> list[tuple[int, ...]]:
    """Return (step, epoch, total_steps, rank, world_size) of each step of a rank, without the passes before step 1."""
    seen = [tuple(entry[1:]) for entry in rank.record if entry[0] == "position"]
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "local_sgd"])
def test_each_step_gets_its_number_and_epoch(strategy: str, tmp_path: Path) -> None:
    # 1,037 samples in batches of 100 are 11 steps per epoch.
    job = make_job(model=MODEL, strategy={"name": strategy}, steps=13, evaluate_every=100)
    ranks = succeed(job, tmp_path, 2)
    for number, rank in enumerate(ranks):
        assert steps_of(rank) == [(step, (step - 1) // 11, 13, number, 2) for step in range(1, 14)]


def test_a_resumed_run_continues_the_numbers(tmp_path: Path) -> None:
    job = make_job(model=MODEL, steps=6, evaluate_every=100)
    first = succeed(job, tmp_path, 1, scripts=Script(stop_after=2))
    rest = succeed(job, tmp_path, 1)
    assert [step for step, *_ in steps_of(first[0])] == [1, 2]
    # The pass that prepares the strategy comes before the checkpoint is read: it gets step 1.
    assert [step for step, *_ in steps_of(rest[0])] == [1, 3, 4, 5, 6]


def test_validation_gets_the_last_step_also_when_a_checkpoint_is_evaluated(tmp_path: Path) -> None:
    job = make_job(model=MODEL, epochs=1, evaluate_every="1ep", deterministic=True)
    succeed(job, tmp_path / "run", 1)
    model = toys.Net()
    model.load_state_dict(final_weights(tmp_path / "run"))
    x, y, _ = toys.points(203, 2)
    with torch.no_grad():
        last = float(F.cross_entropy(model(x), y)) * 11 / 11
    assert logged(tmp_path / "run")[11]["val/loss"] == pytest.approx(last, abs=1e-6)

    longer = make_job(model=MODEL, steps=5, evaluate_every=5, checkpoint={"every": 5})
    succeed(longer, tmp_path / "half", 1)
    path = checkpoint.newest_intact(tmp_path / "half" / "checkpoints").path
    (found,) = succeed(longer, tmp_path / "again", 1, action="evaluate", weights=str(path))
    assert close(found.result["val/loss"], logged(tmp_path / "half")[5]["val/loss"], 1e-6)


def test_the_start_check_passes_the_length_of_the_run() -> None:
    assert "train/share" in estimate(toy_job("Stepping", steps=7), workers=3).tags


def test_a_step_that_needs_more_than_batch_and_step_is_refused() -> None:
    assert "extra" in refused("Demanding")


def test_a_compiled_step_with_changing_numbers_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(toy_job("Stepping", compile=True), workers=1)
    assert caught.value.key == "trainer.compile"
