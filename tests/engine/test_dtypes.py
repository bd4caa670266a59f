"""Parameters that are not float32: complex, float64 and scalar parameters train correctly, or are rejected."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config import Job
from launcher.engine.estimate import estimate
from launcher.engine.order import Order
from launcher.errors import ConfigError
from tests.engine import model_toys as toys
from tests.support.engine_ranks import (
    Script,
    assert_same_run,
    assert_same_weights,
    column,
    launch,
    make_job,
    succeed,
)
from tests.support.engine_toys import Points

STEPS, BATCH, TRAIN = 6, 31, 62
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}
LOCAL = {"name": "local_sgd", "inner_steps": 1}
WHOLE = {"compression": "powersgd", "powersgd_after": 100}


def job_of(model: str, strategy: dict[str, Any] | None = None, **how: Any) -> Job:
    job = make_job(
        model=f"{toys.HERE}.{model}",
        data={"_target_": "Points", "train": TRAIN, "val": 20},
        strategy=strategy,
        **{"optimizer": SGD, "steps": STEPS, "global_batch_size": BATCH, **how},
    )
    return replace(job, trust=[*job.trust, toys.HERE])


def by_hand(model: Any, clip: float | None = None) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, order = Points(TRAIN, 20).train, Order(TRAIN, BATCH, 0)
    for step in range(STEPS):
        start = step % order.steps_per_epoch * BATCH
        optimizer.zero_grad()
        batch = data[order.epoch(step // order.steps_per_epoch)[start : start + BATCH]]
        model.training_step(batch)["loss"].mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


WAVES: dict[str, Any] = {
    "ddp": ({}, {}, 1e-6),
    "clipped": ({"clip_norm": 0.3}, {}, 1e-6),
    "exact": ({"deterministic": True}, {}, 1e-6),
    "bf16": ({}, {"compression": "bf16"}, 2e-2),
    "fp16": ({}, {"compression": "fp16"}, 2e-3),
    "powersgd": ({}, WHOLE, 1e-6),
    "local_sgd": ({}, LOCAL, 1e-6),
}


@pytest.mark.parametrize("kind", WAVES)
@pytest.mark.parametrize("workers", [1, 2])
def test_complex_weights_train_like_in_a_plain_loop(kind: str, workers: int, tmp_path: Path) -> None:
    how, strategy, tolerance = WAVES[kind]
    ranks = succeed(job_of("Waves", strategy, **how), tmp_path, workers)
    expected = dict(by_hand(seeded(toys.Waves), how.get("clip_norm")).named_parameters())
    start = dict(seeded(toys.Waves).named_parameters())
    for name, value in expected.items():
        for rank in ranks:
            assert torch.allclose(rank.weights[name], value, atol=tolerance), name
        if value.is_complex():
            assert not torch.allclose(value.imag, start[name].imag, atol=1e-4), "the imaginary part is trained"


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        ({"name": "diloco", "inner_steps": 3, "overlap_steps": 1}, {}),
        ({"compression": "powersgd", "powersgd_after": 1}, {}),
        ({}, {"deterministic": True}),
        ({}, {"callbacks": {"ema": {"_target_": "launcher.engine.callbacks.Ema", "decay": 0.5}}}),
    ],
    ids=["diloco", "powersgd", "exact", "ema"],
)
def test_a_run_with_complex_weights_can_be_resumed(
    strategy: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    job = job_of("Waves", strategy, optimizer={"_target_": "torch.optim.AdamW", "lr": 0.01}, **how)
    succeed(job, tmp_path / "whole", 2)
    succeed(job, tmp_path / "stopped", 2, scripts=Script(stop_after=4))
    succeed(job, tmp_path / "stopped", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    first, last = column(tmp_path / "whole", "train/loss")[0], column(tmp_path / "whole", "val/loss")[-1]
    assert last < first


def test_a_worker_without_samples_takes_part_with_complex_weights(tmp_path: Path) -> None:
    ranks = succeed(job_of("Waves", global_batch_size=2, steps=3), tmp_path, 3)
    assert_same_weights(
        *({name: rank.weights[name] for name in ("wave", "turn", "head.weight")} for rank in (ranks[0], ranks[2]))
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", [{}, WHOLE, LOCAL, {"name": "fsdp"}], ids=["ddp", "powersgd", "local", "fsdp"])
def test_float64_keeps_its_precision(strategy: dict[str, Any], workers: int, tmp_path: Path) -> None:
    ranks = succeed(job_of("Precise", strategy), tmp_path, workers)
    for name, value in by_hand(seeded(toys.Precise)).state_dict().items():
        given: Any = ranks[0].weights[name]
        assert given.dtype is torch.float64
        if not hasattr(given, "device_mesh"):
            assert torch.allclose(given, value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    ("model", "message"),
    [("Waves", '"turn"'), ("Precise", "float32, .*float64")],
)
def test_parameters_that_fsdp_cannot_shard_are_rejected_before_the_start(
    model: str, message: str, tmp_path: Path
) -> None:
    job = job_of(model, {"name": "fsdp"})
    job = replace(job, model={**job.model, "mixed": True}) if model == "Precise" else job
    with pytest.raises(ConfigError, match=message):
        estimate(job)
    for rank in launch(job, tmp_path, 2):
        assert rank.error is not None
        assert rank.error[0] == "ConfigError"
        assert re.search(message, rank.error[1])
    # `auto` selects a strategy that supports the network.
    ranks = succeed(replace(job, strategy=replace(job.strategy, name="auto")), tmp_path / "auto", 2)
    assert re.search(r"strategy=auto .*\bddp: ", ranks[0].notes)
