"""The learning rate of each step: lengths, intervals, metrics, longer runs, and callbacks that change it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from launcher.engine.schedules import Schedule, rate_of
from launcher.errors import ConfigError, TrustError
from tests.support.engine_ranks import (
    Script,
    assert_same_weights,
    column,
    final_weights,
    launch,
    make_job,
    result_of,
    succeed,
)

OURS = "launcher.engine.optim.WarmupCosine"
LINEAR = "launcher.engine.warmup_schedules.WarmupLinear"
STABLE = "launcher.engine.warmup_schedules.WarmupStableDecay"
THEIRS = "torch.optim.lr_scheduler"
WARMUP_THEN_COSINE = {
    "_target_": f"{THEIRS}.SequentialLR",
    "schedulers": [
        {"_target_": f"{THEIRS}.LinearLR", "start_factor": 0.5, "total_iters": 2},
        {"_target_": f"{THEIRS}.CosineAnnealingLR"},
    ],
    "milestones": [2],
}
CHAINED = {
    "_target_": f"{THEIRS}.ChainedScheduler",
    "schedulers": [{"_target_": f"{THEIRS}.PolynomialLR"}, {"_target_": f"{THEIRS}.StepLR", "step_size": 5}],
}
# Schedules with the length of the run.
SIZED: dict[str, dict[str, Any]] = {
    "ours": {"_target_": OURS, "warmup_ratio": 0.2},
    "cosine": {"_target_": f"{THEIRS}.CosineAnnealingLR"},
    "one cycle": {"_target_": f"{THEIRS}.OneCycleLR", "max_lr": 0.5},
    "polynomial": {"_target_": f"{THEIRS}.PolynomialLR", "power": 2.0},
    "sequential": WARMUP_THEN_COSINE,
    "chained": CHAINED,
}


def tuner(groups: int = 1) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1 * 10**-n} for n in range(groups)], momentum=0.9)


def rates(section: dict[str, Any], steps: int, per_epoch: int = 5, optimizer: Any = None) -> list[float]:
    """Return the rate of each step of a run."""
    optimizer = optimizer or tuner()
    schedule = Schedule(section, optimizer, steps, per_epoch)
    found = []
    for step in range(1, steps + 1):
        found.append(rate_of(optimizer.param_groups[0]))
        schedule.step(step % per_epoch == 0)
    return found


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, [0.1] * 6),
        ({"_target_": OURS}, [0.1, 0.0933, 0.075, 0.05, 0.025, 0.0067]),
        ({"_target_": OURS, "warmup_steps": 2, "min_ratio": 0.5}, [0.05, 0.1, 0.1, 0.0927, 0.075, 0.0573]),
        ({"_target_": OURS, "warmup_steps": 6}, [0.1 * step / 6 for step in range(1, 7)]),
        ({"_target_": LINEAR, "warmup_steps": 2}, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]),
        ({"_target_": LINEAR, "min_ratio": 0.4}, [0.1 * (1 - 0.1 * step) for step in range(6)]),
        ({"_target_": STABLE, "warmup_steps": 2, "decay_steps": 2}, [0.05, 0.1, 0.1, 0.1, 0.1, 0.0293]),
        ({"_target_": STABLE, "decay_ratio": 0.5, "min_ratio": 0.5}, [0.1] * 4 + [0.0711, 0.0592]),
        ({"_target_": f"{THEIRS}.CosineAnnealingLR"}, [0.1, 0.0933, 0.075, 0.05, 0.025, 0.0067]),
        ({"_target_": f"{THEIRS}.CosineAnnealingLR", "T_max": 3}, [0.1, 0.075, 0.025, 0.0, 0.025, 0.075]),
        ({"_target_": f"{THEIRS}.CosineAnnealingLR", "T_max": None}, [0.1, 0.0933, 0.075, 0.05, 0.025, 0.0067]),
        ({"_target_": f"{THEIRS}.StepLR", "step_size": 2}, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        # total_iters is the length of the run in PolynomialLR, and that of a warm-up in other schedules.
        ({"_target_": f"{THEIRS}.PolynomialLR"}, [0.1 * (1 - step / 6) for step in range(6)]),
        ({"_target_": f"{THEIRS}.LinearLR", "start_factor": 0.5}, [0.05, 0.06, 0.07, 0.08, 0.09, 0.1]),
        ({"_target_": f"{THEIRS}.ConstantLR", "factor": 0.5}, [0.05] * 5 + [0.1]),
        # The cosine has the four steps after the warm-up.
        (WARMUP_THEN_COSINE, [0.05, 0.075, 0.1, 0.0854, 0.05, 0.0146]),
        (CHAINED, [0.1 * (1 - step / 6) * 0.1 ** (step // 5) for step in range(6)]),
    ],
)
def test_the_learning_rate_follows_the_schedule(section: dict[str, Any], expected: list[float]) -> None:
    assert rates(section, 6) == pytest.approx(expected, abs=1e-4)


def test_an_interval_of_epochs_counts_epochs() -> None:
    cosine = {"_target_": f"{THEIRS}.CosineAnnealingLR", "interval": "epoch"}
    assert rates(cosine, 6, per_epoch=2) == pytest.approx([0.1, 0.1, 0.075, 0.075, 0.025, 0.025], abs=1e-4)
    assert rates({**cosine, "interval": "step"}, 6, 2) == rates({"_target_": f"{THEIRS}.CosineAnnealingLR"}, 6, 2)
    # A run that ends within an epoch has started that epoch.
    assert rates(cosine, 5, per_epoch=2) == pytest.approx([0.1, 0.1, 0.075, 0.075, 0.025], abs=1e-4)
    with pytest.raises(ConfigError, match=r"scheduler.interval .*'epochs'"):
        rates({**cosine, "interval": "epochs"}, 6)


def test_one_cycle_ends_with_the_run_and_cycles_the_momentum() -> None:
    optimizer = tuner()
    found = rates(SIZED["one cycle"], 20, optimizer=optimizer)
    assert max(found) == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.5 / 25 / 1e4)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("nested", ["torch.nn.Linear", "os.system", "torch.optim.SGD"])
def test_nested_schedules_are_checked(nested: str) -> None:
    with pytest.raises(TrustError):
        rates({**CHAINED, "schedulers": [{"_target_": nested}]}, 6)


# ---- longer runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_longer_run_resumes_like_a_run_of_that_length(name: str, interval: str) -> None:
    section, per_epoch = {**SIZED[name], "interval": interval}, 5 if interval == "step" else 1
    short, long = tuner(2), tuner(2)
    first = Schedule(section, short, 10, per_epoch)
    for step in range(1, 11):
        first.step(step % per_epoch == 0)
    long.load_state_dict(tuner(2).state_dict())
    expected = rates(section, 20, per_epoch, tuner(2))
    again = Schedule(section, long, 20, per_epoch)
    long.load_state_dict(short.state_dict())
    again.load_state_dict(first.state_dict(), 10, 10 // per_epoch)
    found = []
    for step in range(11, 21):
        found.append(rate_of(long.param_groups[0]))
        assert rate_of(long.param_groups[1]) <= found[-1]
        again.step(step % per_epoch == 0)
    assert found == expected[10:]
    assert "20" in again.note
    assert "10" in again.note


@pytest.mark.parametrize("name", [*SIZED, "step"])
def test_a_run_of_the_same_length_resumes_bit_for_bit(name: str) -> None:
    section = SIZED.get(name, {"_target_": f"{THEIRS}.MultiStepLR", "milestones": [3, 7]})
    whole, first, second = (tuner() for _ in range(3))
    expected = rates(section, 10, optimizer=whole)
    schedule = Schedule(section, first, 10, 5)
    for step in range(1, 5):
        schedule.step(step % 5 == 0)
    again = Schedule(section, second, 10, 5)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict(), 4, 0)
    found = []
    for step in range(5, 11):
        found.append(rate_of(second.param_groups[0]))
        again.step(step % 5 == 0)
    assert found == expected[4:]
    assert not again.note


@pytest.mark.parametrize("length", [20, 30])
@pytest.mark.parametrize("name", ["ours", "cosine", "one cycle"])
def test_a_checkpoint_with_only_torchs_state_resumes(name: str, length: int) -> None:
    """The format of launch until version 0.1."""
    before = tuner()
    schedule = Schedule(SIZED[name], before, 20, 5)
    for step in range(1, 9):
        schedule.step(step % 5 == 0)
    optimizer = tuner()
    resumed = Schedule(SIZED[name], optimizer, length, 5)
    optimizer.load_state_dict(before.state_dict())
    resumed.load_state_dict(schedule._scheduler.state_dict(), 8, 1)
    found = []
    for step in range(9, length + 1):
        found.append(rate_of(optimizer.param_groups[0]))
        resumed.step(step % 5 == 0)
    expected = rates(SIZED[name], length)
    if name == "ours" and length != 20:  # its state does not contain its length: step 9 has the previous rate
        found, expected = found[1:], expected[1:]
    assert found == pytest.approx(expected[8:])


def test_a_resumed_run_that_is_longer_equals_one_of_that_length(tmp_path: Path) -> None:
    cosine = {"_target_": f"{THEIRS}.CosineAnnealingLR"}
    succeed(make_job(optimizer={"_target_": "torch.optim.AdamW"}, scheduler=cosine, epochs=2), tmp_path, 1)
    ranks = succeed(make_job(optimizer={"_target_": "torch.optim.AdamW"}, scheduler=cosine, epochs=4), tmp_path, 1)
    found = column(tmp_path, "train/learning_rate")
    assert len(found) == 44
    assert found[22] == pytest.approx(5e-4)
    assert found[-1] == pytest.approx(1.27e-6, rel=0.01)
    assert ranks[0].notes.count("44 steps, not 22") == 1


def test_a_rate_changed_on_resume_takes_effect(tmp_path: Path) -> None:
    adam, cosine = {"_target_": "torch.optim.AdamW"}, WARMUP_THEN_COSINE
    succeed(
        make_job(optimizer={**adam, "lr": 0.1}, scheduler=cosine, steps=6), tmp_path, 1, scripts=Script(stop_after=3)
    )
    succeed(make_job(optimizer={**adam, "lr": 0.2}, scheduler=cosine, steps=6), tmp_path, 1)
    assert column(tmp_path, "train/learning_rate") == pytest.approx([0.05, 0.075, 0.1, 0.1707, 0.1, 0.0293], abs=1e-4)


@pytest.mark.parametrize(
    "section",
    [
        {"_target_": f"{THEIRS}.MultiStepLR", "milestones": [2, 4]},
        {"_target_": f"{THEIRS}.CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "cycle_momentum": False},
        {"_target_": f"{THEIRS}.ReduceLROnPlateau", "patience": 0, "threshold": 9.0, "threshold_mode": "abs"},
        SIZED["one cycle"],
        {"_target_": f"{THEIRS}.ChainedScheduler", "schedulers": [WARMUP_THEN_COSINE, *CHAINED["schedulers"]]},
    ],
)
def test_checkpoints_hold_every_schedule(section: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(scheduler=section, steps=6, evaluate_every=1)
    succeed(job, tmp_path / "whole")
    succeed(job, tmp_path / "parts", scripts=Script(stop_after=3))
    succeed(job, tmp_path / "parts")
    expected = column(tmp_path / "whole", "train/learning_rate")
    assert column(tmp_path / "parts", "train/learning_rate") == expected
    assert len(set(expected)) > 1
    assert_same_weights(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"))


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_reduce_on_plateau_steps_after_each_evaluation(tmp_path: Path) -> None:
    plateau = {"_target_": f"{THEIRS}.ReduceLROnPlateau", "patience": 0, "threshold": 100.0, "threshold_mode": "abs"}
    job = make_job(scheduler=plateau, steps=6, evaluate_every=2)
    succeed(job, tmp_path, 2)
    # The first evaluation is the best so far, and no other is better by 100.
    assert column(tmp_path, "train/learning_rate") == pytest.approx([0.01] * 4 + [0.001] * 2)


def test_reduce_on_plateau_compares_by_mode_and_resumes() -> None:
    section = {"_target_": f"{THEIRS}.ReduceLROnPlateau", "patience": 1}
    optimizer = tuner()
    schedule = Schedule(section, optimizer, 10, 5, "val/accuracy", "max")
    for value in (0.1, 0.2, 0.1):
        schedule.step(True)
        schedule.evaluated({"val/accuracy": value, "val/loss": 1.0})
    assert rate_of(optimizer.param_groups[0]) == 0.1
    other = tuner()
    again = Schedule(section, other, 20, 5, "val/accuracy", "max")
    again.load_state_dict(schedule.state_dict(), 3, 0)
    again.evaluated({"val/accuracy": 0.1})
    assert rate_of(other.param_groups[0]) == pytest.approx(0.01)
    assert not again.note


# ---- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIZED, "none"])
def test_a_rate_that_is_set_multiplies_all_later_ones(name: str) -> None:
    section = SIZED.get(name, {})
    expected, optimizer = rates(section, 20, optimizer=tuner(2)), tuner(2)
    schedule = Schedule(section, optimizer, 20, 5)
    found = []
    for step in range(1, 21):
        found.append(rate_of(optimizer.param_groups[0]))
        if step == 8:  # as in a checkpoint
            optimizer_state, saved = optimizer.state_dict(), schedule.state_dict()
            optimizer = tuner(2)
            schedule = Schedule(section, optimizer, 20, 5)
            optimizer.load_state_dict(optimizer_state)
            schedule.load_state_dict(saved, 7, 1)
        schedule.step(step % 5 == 0)
        if step in (2, 11):
            optimizer.param_groups[0]["lr"] /= 10
    ratio = [1.0] * 2 + [0.1] * 9 + [0.01] * 9
    assert found == pytest.approx([rate * factor for rate, factor in zip(expected, ratio, strict=True)])


def test_a_rate_set_while_the_schedule_is_zero_holds_for_a_step() -> None:
    optimizer = tuner()
    schedule = Schedule({"_target_": f"{THEIRS}.CosineAnnealingLR", "T_max": 2}, optimizer, 6, 6)
    schedule.step(False)
    schedule.step(False)
    assert rate_of(optimizer.param_groups[0]) == 0
    optimizer.param_groups[0]["lr"] = 0.7
    schedule.step(False)
    assert rate_of(optimizer.param_groups[0]) == pytest.approx(0.05)


def test_a_callback_may_set_the_rate_of_a_run(tmp_path: Path) -> None:
    callbacks = {"drop": {"_target_": "Drop", "at": 2}}
    cosine = {"_target_": f"{THEIRS}.CosineAnnealingLR"}
    plain = make_job(scheduler=cosine, steps=6)
    succeed(plain, tmp_path / "plain", 1)
    job = make_job(scheduler=cosine, steps=6, callbacks=callbacks)
    succeed(job, tmp_path / "set", 2, scripts=Script(stop_after=4))
    succeed(job, tmp_path / "set", 2)
    expected = column(tmp_path / "plain", "train/learning_rate")
    assert column(tmp_path / "set", "train/learning_rate") == pytest.approx(
        [rate / (10 if step >= 2 else 1) for step, rate in enumerate(expected)]
    )
    assert result_of(tmp_path / "set")["status"] == "completed"
    assert final_weights(tmp_path / "set")


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_warm_up_longer_than_the_run_is_an_error(tmp_path: Path) -> None:
    job = make_job(steps=5, scheduler={"_target_": OURS, "warmup_steps": 6})
    (rank,) = launch(job, tmp_path)
    assert rank.error is not None
    assert rank.error[0] == "ConfigError"
    assert re.search(r"^scheduler\.warmup_steps=6 .* 0 .* 5 ", rank.error[1])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"_target_": STABLE, "warmup_steps": 4, "decay_steps": 3}, "scheduler.decay_steps"),
        ({"_target_": STABLE, "decay_ratio": 1.5}, "scheduler.decay_ratio"),
        ({"_target_": LINEAR, "warmup_ratio": -0.1}, "scheduler.warmup_ratio"),
    ],
)
def test_parts_that_do_not_fit_the_run_are_refused(section: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rates(section, 6)
    assert caught.value.key == key
