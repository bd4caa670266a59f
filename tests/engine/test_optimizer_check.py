"""Values that an optimizer, a schedule or another class rejects are reported before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from launcher.engine.estimate import estimate
from launcher.engine.optimizer_check import optimizer_bytes, try_optimizer
from launcher.errors import ConfigError, UserCodeError
from tests.support.engine_ranks import make_job
from tests.support.engine_toys import Net

ADAM, SGD = "torch.optim.AdamW", "torch.optim.SGD"
THEIRS = "torch.optim.lr_scheduler"


def refused(**how: Any) -> str:
    """Return the one-paragraph error of the start check for a job."""
    with pytest.raises(ConfigError) as caught:
        estimate(make_job(**how))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"_target_": ADAM, "weight_decay": -1}, "weight_decay=-1"),
        ({"_target_": SGD, "lr": 0.1, "nesterov": True}, "Nesterov"),
        ({"_target_": ADAM, "betas": [2.0, 0.9]}, "beta"),
        ({"_target_": ADAM, "eps": "small"}, "eps=small"),
        ({"_target_": ADAM, "foreach": True, "fused": True}, "fused"),
        ({"_target_": "torch.optim.LBFGS"}, "torch.optim.LBFGS"),
        ({"_target_": "torch.optim.Muon"}, "2D"),
        ({"_target_": ADAM, "groups": [{"match": "stem.*", "weight_decay": -1}]}, "weight_decay=-1"),
        ({"_target_": SGD, "groups": [{"match": "stem.*", "betas": [0.9, 0.9]}]}, "optimizer.betas "),
        ({"_target_": ADAM, "groups": [{"match": "stem.*", "lr": None}]}, "lr"),
        ({"_target_": "Stubborn"}, "wants a model of convolutions"),
    ],
)
def test_values_that_an_optimizer_rejects(optimizer: dict[str, Any], words: str) -> None:
    if "." not in optimizer["_target_"]:
        optimizer = {**optimizer, "_target_": f"tests.support.engine_toys.{optimizer['_target_']}"}
    assert words in refused(optimizer=optimizer)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"_target_": f"{THEIRS}.OneCycleLR", "max_lr": 0.1, "total_steps": 5}, "total_steps=5"),
        ({"_target_": f"{THEIRS}.OneCycleLR", "max_lr": 0.1, "epochs": 1, "steps_per_epoch": 3}, "steps_per_epoch=3"),
        ({"_target_": f"{THEIRS}.OneCycleLR", "max_lr": [0.1, 0.2]}, "max_lr"),
        ({"_target_": f"{THEIRS}.StepLR"}, "step_size"),
        ({"_target_": f"{THEIRS}.StepLR", "step_size": 0}, "step_size=0"),
        ({"_target_": f"{THEIRS}.LinearLR", "start_factor": 7}, "start_factor=7"),
        (
            {"_target_": f"{THEIRS}.CyclicLR", "base_lr": 0.1, "max_lr": 1, "scale_mode": "odd", "mode": "odd"},
            "mode=odd",
        ),
        ({"_target_": f"{THEIRS}.SequentialLR", "schedulers": [{"_target_": f"{THEIRS}.ConstantLR"}]}, "milestones"),
        (
            {"_target_": f"{THEIRS}.ChainedScheduler", "schedulers": [{"_target_": f"{THEIRS}.ReduceLROnPlateau"}]},
            "ChainedScheduler",
        ),
        ({"_target_": f"{THEIRS}.ReduceLROnPlateau", "factor": 2.0}, "factor=2.0"),
        ({"_target_": f"{THEIRS}.CosineAnnealingLR", "interval": "minute"}, "scheduler.interval"),
    ],
)
def test_values_that_a_schedule_rejects(scheduler: dict[str, Any], words: str) -> None:
    assert words in refused(scheduler=scheduler, epochs=3)


def test_a_schedule_of_another_length_is_found_in_a_long_run() -> None:
    cycle = {"_target_": f"{THEIRS}.OneCycleLR", "max_lr": 0.1, "total_steps": 30_000}
    assert "total_steps=30000" in refused(scheduler=cycle, steps=100_000)
    estimate(make_job(scheduler={**cycle, "total_steps": 100_000}, steps=100_000))


def test_reduce_on_plateau_needs_a_metric() -> None:
    plateau = {"_target_": f"{THEIRS}.ReduceLROnPlateau"}
    assert "`val`" in refused(scheduler=plateau, data={"_target_": "Flowless"})
    assert "checkpoint.monitor=null" in refused(scheduler=plateau, checkpoint={"monitor": None})


def test_values_that_a_model_or_a_callback_rejects() -> None:
    assert "dropout=2" in refused(model={"_target_": "Net", "dropout": 2})
    assert "width=-3" in refused(model={"_target_": "Net", "width": -3})
    callback = {"drop": {"_target_": "Drop", "at": -1}}
    assert "callbacks.drop" in refused(callbacks=callback)


def test_a_defect_of_the_users_class_keeps_its_traceback() -> None:
    with pytest.raises(UserCodeError) as caught:
        estimate(make_job(optimizer={"_target_": "tests.support.engine_toys.Defective"}))
    assert "engine_toys" in caught.value.traceback_text


def test_the_check_builds_one_model() -> None:
    """torch.optim.Adagrad creates its state in the constructor."""
    model = Net(width=400)
    job = make_job(optimizer={"_target_": "torch.optim.Adagrad", "groups": [{"match": "stem.*", "lr": 0.5}]})
    optimizer, nbytes = try_optimizer(job, model)
    smalls = [p for group in optimizer.param_groups for p in group["params"]]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]  # matrices, vectors
    assert sum(p.numel() for p in smalls) < 1000
    assert nbytes == 4 * sum(p.numel() for p in model.parameters())


def test_the_check_changes_neither_the_model_nor_random_states() -> None:
    model = Net()
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    assert optimizer_bytes(make_job(), model) == 8 * sum(p.numel() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_every_kind_of_parameter_is_tried() -> None:
    model = nn.ParameterDict(
        {
            "complex": nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
            "scalar": nn.Parameter(torch.zeros(())),
            "empty": nn.Parameter(torch.zeros(0, 2)),
            "cube": nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.bfloat16)),
        }
    )
    optimizer, _ = try_optimizer(make_job(), model)
    assert len(optimizer.param_groups[0]["params"]) == 4
