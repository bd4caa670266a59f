"""Exactness: losses and weights are the same for any number of workers, and equal those of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launcher.engine.order import Order
from tests.support import engine_toys as toys
from tests.support.engine_ranks import (
    assert_same_log,
    assert_same_weights,
    column,
    final_weights,
    make_job,
    succeed,
)

pytestmark = pytest.mark.gpu

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}
GROUPS = {
    "_target_": "torch.optim.AdamW",
    "lr": 0.01,
    "groups": [{"match": "head.*", "lr": 0.001, "weight_decay": 0.3}, {"match": "stem.weight", "freeze": True}],
}
COSINE = {"_target_": "launcher.engine.optim.WarmupCosine", "warmup_steps": 5}

# Not Adam, which normalises the gradient and would hide a wrong factor.
DECAY: dict[str, Any] = {"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.05}

EXACT: dict[str, dict[str, Any]] = {
    "the issue's": {"model": {"_target_": "models.vision.ConvNet", "width": 4}, "data": "Pictures"},
    "clipped, groups, schedule": {
        "model": "Summary",
        "data": {"_target_": "Points", "several": True},
        "optimizer": GROUPS,
        "scheduler": COSINE,
        "clip_norm": 0.05,
    },
    "tokens, momentum, seed": {"model": "Tokens", "optimizer": SGD, "seed": 7, "microbatch_size": 9},
    "fewer samples than workers": {
        "model": "Tokens",
        "data": {"_target_": "Points", "train": 16, "val": 3},
        "global_batch_size": 3,
        "clip_norm": 1.0,
    },
    "fractional weights": {"model": "Weighted", "optimizer": SGD},
    "parameters that the first batch does not use": {"model": "Branches"},
    "parameters that later batches do not use": {"model": {"_target_": "Branches", "residue": 30, "never": False}},
}


@pytest.mark.parametrize("case", EXACT)
def test_deterministic_mode_gives_the_same_bits_for_any_number_of_workers(case: str, tmp_path: Path) -> None:
    job = make_job(deterministic=True, epochs=2, **EXACT[case])
    for workers in (1, 2, 3, 4):
        ranks = succeed(job, tmp_path / str(workers), workers)
        for rank in ranks[1:]:
            assert_same_weights(ranks[0].weights, rank.weights)
        if workers > 1:
            assert_same_log(tmp_path / "1", tmp_path / str(workers))
            assert_same_weights(final_weights(tmp_path / "1"), final_weights(tmp_path / str(workers)))
    losses = column(tmp_path / "1", "train/loss")
    assert len(losses) == 12 if case == "fewer samples than workers" else len(losses) == 22
    assert losses[-1] < losses[0]  # it must learn: a run without updates would trivially be equal


def plain_loop(steps: int, batch: int, loss_of: Any, network: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with a plain loop in one process: the mean loss of the whole batch, in the engine's order."""
    torch.manual_seed(0)
    model = network()
    tuner = torch.optim.SGD(model.parameters(), **{key: value for key, value in DECAY.items() if key != "_target_"})
    x, y, number = toys.points(1037, 1)
    order, losses = Order(1037, batch, 0), []
    for step in range(steps):
        epoch, position = divmod(step, order.steps_per_epoch)
        chosen = order.epoch(epoch)[position * batch : (position + 1) * batch]
        loss = loss_of(model, (x[chosen], y[chosen], number[chosen]))
        tuner.zero_grad()
        loss.backward()
        tuner.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def mean_loss(model: Any, batch: Any) -> torch.Tensor:
    x, y, _ = batch
    return F.cross_entropy(model(x), y)


def mean_over_tokens(model: Any, batch: Any) -> torch.Tensor:
    total, count = model.training_step(batch)["loss"]
    return total / count


def mean_of_step(model: Any, batch: Any) -> torch.Tensor:
    return model.training_step(batch)["loss"].mean()


REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "samples": (mean_loss, {"model": "Net"}),
    "tokens": (mean_over_tokens, {"model": "Tokens"}),
    "weights": (mean_over_tokens, {"model": "Weighted"}),
    "tokens in microbatches": (mean_over_tokens, {"model": "Tokens", "microbatch_size": 11}),
    # Weight decay changes a parameter whose gradient is zero, but not one without gradient.
    "unused parameters": (mean_of_step, {"model": "Branches"}),
    "unused parameters in microbatches": (mean_of_step, {"model": "Branches", "microbatch_size": 11}),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_losses_equal_those_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    loss_of, how = REFERENCES[case]
    # 107 samples give unequal shares to 2, 3 and 4 workers; 20 steps include the smaller last batch of an epoch.
    expected, weights = plain_loop(20, 107, loss_of, getattr(toys, how["model"]))
    cases = ((1, False), (2, False), (3, False), (4, False), (2, True))
    for workers, deterministic in cases if case == "samples" else cases[::2]:
        directory = tmp_path / f"{workers}{deterministic}"
        succeed(
            make_job(global_batch_size=107, steps=20, deterministic=deterministic, optimizer=DECAY, **how),
            directory,
            workers,
        )
        assert column(directory, "train/loss") == pytest.approx(expected, abs=1e-5), f"{workers} workers"
        for name, value in final_weights(directory).items():
            torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=0, msg=f"{name}, {workers} workers")
