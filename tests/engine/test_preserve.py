"""Checks, estimates and drawings leave a model unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine import advice
from launcher.engine.build import build_strategy
from launcher.engine.drawing import traced_step
from launcher.engine.examples import Examples
from launcher.engine.preserve import evaluation_mode, preserve_model
from launcher.engine.runtime import Runtime
from tests.engine import model_toys as toys
from tests.support.engine_ranks import final_weights, make_job, on_ranks, succeed
from tests.support.engine_toys import Points


def batch_of(count: int) -> Any:
    return Points().train[:count]


def _drawn(model: Any, runtime: Runtime) -> None:
    traced_step(model, batch_of(5), runtime.device)


def _measured(model: Any, runtime: Runtime) -> None:
    advice._pass(model, lambda: model.training_step(batch_of(5)), runtime.device)


def _shown(model: Any, runtime: Runtime) -> None:
    Examples(model, lambda values: None, lambda text: pytest.fail(text), 0).show("val/", batch_of(5), [])


def _prepared(model: Any, runtime: Runtime, **how: Any) -> None:
    job = make_job(strategy=how.pop("strategy", None), **how)
    build_strategy(job, model, runtime).prepare(batch_of(5))


LOOKS = {
    "drawn": _drawn,
    "measured": _measured,
    "shown": _shown,
    "prepared": _prepared,
    "prepared exactly": lambda model, runtime: _prepared(model, runtime, deterministic=True),
    "prepared for local SGD": lambda model, runtime: _prepared(model, runtime, strategy={"name": "local_sgd"}),
}


def _look(runtime: Runtime, kind: str) -> list[str]:
    torch.manual_seed(1)  # equal weights on all ranks, so broadcasting those of rank 0 changes nothing
    model = toys.Meddling()
    before = toys.snapshot(model)
    LOOKS[kind](model, runtime)
    return toys.differences(before, toys.snapshot(model))


@pytest.mark.parametrize("kind", LOOKS)
def test_checks_leave_a_model_unchanged_on_every_rank(kind: str) -> None:
    assert on_ranks(_look, 2, kind) == [[], []]


def _spoil(model: Any) -> None:
    with preserve_model(model):
        model.training_step(batch_of(5))
        model.stem.weight.register_hook(lambda grad: grad)
        model.head.weight.data.fill_(torch.nan)
        model.stem.requires_grad_(False)
        del model.norm
        raise KeyError("the user's own mistake")


def test_a_failing_check_leaves_the_model_unchanged_too() -> None:
    model = toys.Meddling()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = toys.snapshot(model)
    with pytest.raises(KeyError):
        _spoil(model)
    assert toys.differences(before, toys.snapshot(model)) == []
    assert not model.stem.weight._backward_hooks


def test_evaluating_calls_the_models_own_train_and_keeps_every_mode() -> None:
    """A model may merge its LoRA weights in `eval()`, and must be able to split them again in `train()`."""

    class Merging(toys.Plain):
        merged = False

        def train(self, mode: bool = True) -> Any:
            self.merged = not mode
            return super().train(mode)

    model = Merging()
    model.head.eval()
    seen = []
    with evaluation_mode(model):
        seen.append((model.merged, model.stem.training))
    assert [*seen, (model.merged, model.stem.training)] == [(True, False), (False, True)]
    assert (model.training, model.stem.training, model.head.training) == (True, True, False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_frozen_teacher_is_not_called_outside_of_microbatches(workers: int, tmp_path: Path) -> None:
    logging = {"tensorboard": True, "graph": True}
    job = make_job(model=f"{toys.HERE}.Meddling", data={"_target_": "Points", "train": 300}, steps=6, logging=logging)
    ranks = succeed(replace(job, trust=[*job.trust, toys.HERE]), tmp_path, workers)
    for rank in ranks:
        # The list has one entry per step from the first step on, although the network was drawn in between.
        since = next(at for at, entry in enumerate(rank.record) if entry[0] == "step")
        modes = [entry for entry in rank.record[since:] if entry[0] == "modes"]
        assert modes == [("modes", False, True)] * 6
        # Six steps and one microbatch of each validation: warm-up, advice and drawing leave no trace.
        assert rank.weights["norm.num_batches_tracked"] == 6
    assert final_weights(tmp_path)["norm.num_batches_tracked"] == 6
