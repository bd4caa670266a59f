"""The set of trained parameters may change between two steps, and other changes are detected: unfreezing, drift."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import Job
from launcher.engine.drift import Copy, Drift, checksums
from launcher.engine.optim import WarmupCosine
from launcher.engine.order import Order
from launcher.engine.runtime import Runtime
from launcher.errors import TrainingError
from tests.engine import model_toys as toys
from tests.support.engine_ranks import (
    Script,
    assert_same_run,
    assert_same_weights,
    final_weights,
    launch,
    make_job,
    on_ranks,
    succeed,
)
from tests.support.engine_toys import Points

STEPS, BATCH, TRAIN = 9, 30, 120
SCHEDULE = {"_target_": "launcher.engine.optim.WarmupCosine", "warmup_steps": 2}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
PLAN = {3: {"stem": True}, 6: {"head": False}, 7: {"head": True}}


def job_of(callback: dict[str, Any] | None = None, model: Any = "Frozen", **how: Any) -> Job:
    given = {"_target_": model} if isinstance(model, str) else model
    callbacks = {"switch": {"_target_": f"{toys.HERE}.Switching", **callback}} if callback else None
    job = make_job(
        model={**given, "_target_": f"{toys.HERE}.{given['_target_']}"},
        data={"_target_": "Points", "train": TRAIN, "val": 20},
        callbacks=callbacks,
        **{"steps": STEPS, "global_batch_size": BATCH, **how},
    )
    return replace(job, trust=[*job.trust, toys.HERE])


def by_hand(optimizer: dict[str, Any], plan: dict[int, dict[str, bool]], clip: float) -> dict[str, torch.Tensor]:
    """The run of `Frozen` as a plain loop, with another learning rate for the stem."""
    torch.manual_seed(0)
    model = toys.Frozen()
    kind = getattr(torch.optim, optimizer["_target_"].rsplit(".", 1)[1])
    settings = {key: value for key, value in optimizer.items() if key not in ("_target_", "groups")}
    groups = [
        {"params": model.head.parameters()},
        {"params": model.stem.parameters(), "lr": optimizer["groups"][0]["lr"]},
    ]
    chosen = kind(groups, **settings, fused=False)
    schedule = WarmupCosine(chosen, STEPS, warmup_steps=2)
    data, order = Points(TRAIN, 20).train, Order(TRAIN, BATCH, 0)
    for step in range(STEPS):
        for part, trained in plan.get(step, {}).items():
            model.get_submodule(part).requires_grad_(trained)
        start = step % order.steps_per_epoch * BATCH
        batch = data[order.epoch(step // order.steps_per_epoch)[start : start + BATCH]]
        chosen.zero_grad()
        model.training_step(batch)["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        chosen.step()
        schedule.step()
    return model.state_dict()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [SGD, {"_target_": "torch.optim.AdamW", "lr": 0.05}], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("exact", [False, True], ids=["ddp", "exact"])
def test_what_a_callback_unfreezes_is_trained_as_in_a_plain_loop(
    workers: int, optimizer: dict[str, Any], exact: bool, tmp_path: Path
) -> None:
    chosen = {**optimizer, "groups": [{"match": "stem.*", "lr": 0.02}]}
    job = job_of({"plan": PLAN}, optimizer=chosen, clip_norm=0.5, scheduler=SCHEDULE, deterministic=exact)
    ranks = succeed(job, tmp_path, workers)
    expected = by_hand(chosen, PLAN, 0.5)
    for rank in ranks:
        for name, value in expected.items():
            assert torch.allclose(rank.weights[name], value, atol=2e-6), name
        assert_same_weights(rank.weights, ranks[0].weights)
    assert re.search(r" 2 \w+ \(stem\.weight, stem\.bias\), .*\bon_step\b", ranks[0].notes)
    assert re.search(r" 2 \w+ \(head\.weight, head\.bias\)", ranks[0].notes)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_run_that_changed_what_it_trains_is_resumed(workers: int, stop: int, tmp_path: Path) -> None:
    chosen = {**SGD, "groups": [{"match": "stem.*", "lr": 0.02}]}
    job = job_of({"plan": PLAN}, optimizer=chosen, scheduler=SCHEDULE)
    succeed(job, tmp_path / "whole", workers)
    succeed(job, tmp_path / "stopped", workers, scripts=Script(stop_after=stop))
    succeed(job, tmp_path / "stopped", workers)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("hook", ["on_start", "on_evaluate"])
def test_every_hook_between_two_steps_may_change_it(hook: str, tmp_path: Path) -> None:
    at = 0 if hook == "on_start" else 4
    job = job_of({"plan": {at: {"stem": True}}, "hook": hook}, evaluate_every=4)
    ranks = succeed(job, tmp_path, 2)
    assert_same_weights(ranks[0].weights, ranks[1].weights)
    assert re.search(rf" {at + 1} .*\(stem\.weight, stem\.bias\)", ranks[0].notes)
    succeed(job_of(), tmp_path / "without", 2)
    assert not torch.equal(final_weights(tmp_path)["stem.weight"], final_weights(tmp_path / "without")["stem.weight"])


@pytest.mark.parametrize(
    "strategy", [{"name": "fsdp"}, {"name": "local_sgd"}, {"name": "diloco"}, {"compression": "powersgd"}]
)
def test_a_strategy_that_cannot_follow_raises(strategy: dict[str, str], tmp_path: Path) -> None:
    for rank in launch(job_of({"plan": {2: {"stem": True}}}, strategy=strategy), tmp_path, 2):
        assert rank.error is not None
        assert rank.error[0] == "TrainingError"
        assert re.search(r" 2 \(stem\.weight, stem\.bias\)", rank.error[1])


def test_unfreezing_on_one_rank_alone_is_an_error(tmp_path: Path) -> None:
    ranks = launch(job_of({"plan": {3: {"stem": True}}, "only": 1}, log_every=4), tmp_path, 2)
    assert ranks[1].error is not None
    assert ranks[1].error[0] == "TrainingError"
    assert re.search(r" 3, .*requires_grad", ranks[1].error[1])
    assert ranks[0].error is not None


# ---- what is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", [{}, {"name": "local_sgd"}], ids=["ddp", "local_sgd"])
def test_what_changes_inside_a_step_is_an_error(workers: int, strategy: dict[str, str], tmp_path: Path) -> None:
    job = job_of(model={"_target_": "Frozen", "inside": 3}, log_every=2, strategy=strategy)
    for rank in launch(job, tmp_path, workers):
        assert rank.error is not None
        assert rank.error[0] == "TrainingError"
        assert re.search(r"requires_grad .*\bstem\.bias, stem\.weight .* 4 ", rank.error[1])


def test_weights_that_drift_apart_are_an_error_within_a_log_interval(tmp_path: Path) -> None:
    job = job_of(model={"_target_": "Frozen", "inside": 3, "only": 1, "alone": True}, log_every=4)
    for rank in launch(job, tmp_path, 2):
        assert rank.error is not None
        assert rank.error[0] == "TrainingError"
        assert re.search(r" 4: head\.weight .* 1 .* 0\b", rank.error[1])


def _compare(runtime: Runtime, kind: str, kinds: list[str]) -> Any:
    torch.manual_seed(0)
    weights = {"a": torch.randn(5, 3), "b": torch.randn(7), "c": torch.randn(2, 3, dtype=torch.complex64)}
    graded = ["a", "b"]
    if runtime.rank == 1:
        change = {"bit": 1e-7, "far": 0.1}.get(kind, 0.0)
        weights["b"][3] += change * weights["b"].abs().max()
        graded = graded[:1] if kind == "gradients" else graded
    notes: list[str] = []
    drift = Drift(runtime, kinds, notes.append)
    for _ in range(2):
        try:
            drift.check(Copy(list(weights.items()), ["a", "b", "c"], graded, []), 8)
        except TrainingError as error:
            return str(error), notes, weights
    return "", notes, weights


@pytest.mark.parametrize(
    ("kind", "kinds", "message", "noted"),
    [
        ("same", ["T4", "T4", "T4"], "", 0),
        ("bit", ["T4", "T4", "T4"], "differ at step 8: b of rank 1 differs from rank 0", 0),
        ("bit", ["T4", "V100", "T4"], "", 1),
        ("far", ["T4", "V100", "T4"], "differ at step 8: b of rank 1 differs from rank 0", 0),
        ("gradients", ["T4", "V100", "T4"], "gradient for the same parameter at step 8: b on rank 0, 2 only", 0),
    ],
)
def test_copies_are_compared_by_their_bits(kind: str, kinds: list[str], message: str, noted: int) -> None:
    answers = on_ranks(_compare, 3, kind, kinds)
    for error, notes, weights in answers:
        assert message in error
        assert bool(message) == bool(error)
        assert len(notes) == noted, "the note is logged once"
        if not message:
            assert_same_weights(weights, answers[0][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (8, 5), (2, 3, 4, 5)])
def test_a_checksum_sees_one_bit_and_not_the_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, dtype=dtype)
    other = value.clone()
    bits = other.view(-1).view(torch.uint8)
    bits[0] ^= 1
    last = value.clone(memory_format=torch.channels_last) if len(shape) == 4 else value.clone()
    one, two, three = checksums([value, other, last]).tolist()
    assert one != two
    if dtype is torch.float32:
        assert isinstance(three, int)
