"""Sparse gradients train like dense ones, or are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.estimate import estimate
from launcher.errors import ConfigError
from tests.support.engine_ranks import column, final_weights, launch, make_job, succeed

SGD = {"_target_": "torch.optim.SGD", "lr": 0.5}
ADAGRAD = {"_target_": "torch.optim.Adagrad", "lr": 0.1}


def run(directory: Path, workers: int, model: dict[str, Any], optimizer: dict[str, Any], **how: Any) -> Path:
    # The last batch of the epoch has one sample, so one worker has none.
    job = make_job(
        model={"_target_": "Table", **model},
        data={"_target_": "Points", "train": 201},
        optimizer=optimizer,
        epochs=2,
        **how,
    )
    succeed(job, directory, workers)
    return directory


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (SGD, {}),
        (ADAGRAD, {"clip_norm": 0.05, "microbatch_size": 7}),
        (SGD, {"strategy": {"name": "local_sgd", "inner_steps": 2}}),
    ],
)
def test_sparse_gradients_train_like_dense_ones(optimizer: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    for workers in (1, 2):
        dense = run(tmp_path / f"dense{workers}", workers, {"sparse": False}, optimizer, **how)
        sparse = run(tmp_path / f"sparse{workers}", workers, {}, optimizer, **how)
        for name, value in final_weights(dense).items():
            torch.testing.assert_close(final_weights(sparse)[name], value, rtol=1e-5, atol=1e-6)
        for tag in ("train/loss", "train/grad_norm", "val/loss"):
            assert column(sparse, tag) == pytest.approx(column(dense, tag), rel=1e-4)


def test_a_model_of_sparse_gradients_alone_trains_with_sparse_adam(tmp_path: Path) -> None:
    adam = {"_target_": "torch.optim.SparseAdam", "lr": 0.05}
    weights = [final_weights(run(tmp_path / str(n), n, {"alone": True}, adam))["table.weight"] for n in (1, 3)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    assert not torch.equal(weights[0][:37], torch.nn.Embedding(50, 1).weight[:37])
    assert torch.equal(weights[0][37:], weights[1][37:])  # rows that no sample uses


@pytest.mark.parametrize(
    ("model", "optimizer", "how", "words"),
    [
        ({}, {"_target_": "torch.optim.AdamW"}, {}, "sparse=False"),
        ({}, {**SGD, "momentum": 0.9}, {}, "optimizer._target_=torch.optim.SGD"),
        ({}, {**SGD, "weight_decay": 0.1}, {}, "weight_decay"),
        ({}, {**SGD, "fused": True}, {}, "fused"),
        ({}, {"_target_": "torch.optim.SparseAdam"}, {}, "torch.optim.SparseAdam"),
        ({}, SGD, {"deterministic": True}, "trainer.deterministic=true"),
        ({}, SGD, {"strategy": {"name": "fsdp"}}, "strategy=fsdp"),
        ({}, SGD, {"strategy": {"compression": "bf16"}}, "strategy.compression=bf16"),
    ],
)
def test_unsupported_settings_are_rejected_at_the_start(
    model: dict[str, Any], optimizer: dict[str, Any], how: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(make_job(model={"_target_": "Table", **model}, optimizer=optimizer, **how))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_with_both_kinds_of_gradients_is_refused(tmp_path: Path) -> None:
    job = make_job(model={"_target_": "Table", "tied": True}, optimizer=SGD, steps=2)
    for rank in launch(job, tmp_path, 2):
        assert rank.error is not None
        assert rank.error[0] == "ConfigError"
        assert "table.weight" in rank.error[1]
