"""Metrics are exact: the logged value is the mean over every sample of all workers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.metrics import ContractError, Sums, as_pair, check_answer, means
from launcher.engine.runtime import Runtime
from tests.support.engine_ranks import Rank, column, launch, logged, make_job, succeed

CPU = torch.device("cpu")
ALONE = Runtime.single("cpu")


def recorded_losses(ranks: list[Rank]) -> dict[int, tuple[list[int], list[float]]]:
    """Return {step: (numbers of the samples, their losses)} of all ranks, as the network itself recorded them."""
    steps: dict[int, tuple[list[int], list[float]]] = {}
    for rank in ranks:
        step = 0  # before the first step: the batch that the engine tries out
        for what, *content in rank.record:
            if what == "step":
                (step,) = content
            elif what == "losses" and step:
                numbers, losses = steps.setdefault(step, ([], []))
                numbers += content[0]
                losses += content[1]
    return steps


@pytest.mark.parametrize(
    ("model", "workers", "how"),
    [
        ("Net", 3, {}),
        ("Tokens", 3, {"microbatch_size": 10}),
        ("Tokens", 2, {"deterministic": True}),
        ("Net", 2, {"precision": "bfloat16", "microbatch_size": 20}),
        ("Tokens", 4, {"global_batch_size": 3}),
    ],
    ids=["samples", "tokens, microbatches", "tokens, deterministic", "bfloat16", "empty shares"],
)
def test_logged_loss_is_the_sum_over_all_ranks_by_the_count(
    model: str, workers: int, how: dict[str, Any], tmp_path: Path
) -> None:
    job = make_job(model={"_target_": model, "note": True}, steps=13, log_every=4, **{"global_batch_size": 107, **how})
    ranks = succeed(job, tmp_path, workers)
    steps = recorded_losses(ranks)
    batch = job.trainer.global_batch_size
    assert [len(numbers) for numbers, _ in steps.values()] == [min(batch, 1037 - batch * (s % 10)) for s in range(13)]
    by_hand = {}
    for first, last in ((1, 4), (5, 8), (9, 12), (13, 13)):
        losses = [loss for step in range(first, last + 1) for loss in steps[step][1]]
        by_hand[last] = math.fsum(losses) / len(losses)
    lines = {step: values["train/loss"] for step, values in logged(tmp_path).items() if "train/loss" in values}
    assert lines == pytest.approx(by_hand, rel=1e-6)
    # The ranks have different counts, so a mean of the ranks' means would differ.
    counts = {len(numbers) for numbers, _ in (recorded_losses([rank]).get(1, ([], [])) for rank in ranks)}
    assert len(counts) > 1


def test_every_sample_is_used_once_per_epoch(tmp_path: Path) -> None:
    job = make_job(model={"_target_": "Net", "note": True}, epochs=2, global_batch_size=100, microbatch_size=7)
    steps = recorded_losses(succeed(job, tmp_path, 3))
    for epoch in (0, 1):
        numbers = [number for step in range(1, 12) for number in steps[11 * epoch + step][0]]
        assert sorted(numbers) == list(range(1037))
    assert set(steps[1][0]) != set(steps[12][0])  # every epoch has another order


def test_a_batch_without_tokens_changes_no_weight(tmp_path: Path) -> None:
    for deterministic in (False, True):
        directory = tmp_path / str(deterministic)
        job = make_job(model="Masked", steps=20, deterministic=deterministic, optimizer={**SGD})
        ranks = succeed(job, directory, 2)
        assert all(value.isfinite().all() for value in ranks[0].weights.values())
        entries = logged(directory)
        assert entries[5]["train/grad_norm"] > 0
        assert entries[20]["train/grad_norm"] == 0
        assert entries[20]["train/loss"] is None  # the mean is undefined


SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("scalar", r'validation_step .*"loss".* \(\)\..*reduction="none"'),
        ("list", r'"loss": .* list\.'),
        ("nameless", r'^training_step .*"loss"; .*\blos\b'),
        ("text", r'validation_step .*"loss".*\bstr\.'),
        ("detached", r'^training_step [^;]*"loss" [^;]*; \D*$'),
        ("sum of a shape", r"; .*\((13|50),\)"),
        ("new name", r"; .*\bextra\b"),
        ("lost name", r"; .*\baccuracy\b"),
        ("new shape", r'"shape" .*\(2,\) .*\(3,\)'),
    ],
)
def test_an_invalid_result_of_the_model_is_reported(kind: str, words: str, tmp_path: Path) -> None:
    # One of the two ranks reads sample 900; the other must not hang, nor reduce mismatching tensors.
    ranks = launch(make_job(model={"_target_": "Odd", "kind": kind}), tmp_path, 2, timeout=240)
    errors = [rank.error for rank in ranks if rank.error and rank.error[0] == "ContractError"]
    assert errors, ranks
    assert "Traceback" not in errors[0][1] + errors[0][2]
    assert re.search(words, errors[0][1]), errors[0][1]
    assert all(rank.error and rank.error[0] in ("ContractError", "WorkerLost") for rank in ranks)


@pytest.mark.parametrize("kind", ["names", "shapes"])
def test_validation_results_that_differ_between_ranks_are_reported(kind: str, tmp_path: Path) -> None:
    ranks = launch(make_job(model={"_target_": "Uneven", "kind": kind}), tmp_path, 2, timeout=240)
    for rank in ranks:
        assert rank.error is not None
        assert rank.error[0] == "TrainingError"
        assert ("extra" if kind == "names" else "shape") in rank.error[1]


# ---- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "total", "count"),
    [
        (torch.tensor([1.0, 2.5]), 3.5, 2),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 10.0, 4),
        (torch.tensor([True, False, True]), 2, 3),
        (torch.tensor([3, 4]), 7, 2),
        (torch.empty(0), 0.0, 0),
        ((torch.tensor(6.0), 3), 6.0, 3),
        ((6.0, torch.tensor(3)), 6.0, 3),
        ([6, 3], 6, 3),
        (torch.full((3000,), 100.0, dtype=torch.float16), 300000.0, 3000),  # float16 overflows at 65504
        (
            torch.cat([torch.full((1,), 256.0), torch.ones(200)]).bfloat16(),
            456.0,
            201,
        ),  # in bfloat16 the sum would remain 256
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_a_value_is_converted_to_its_sum_and_count(value: Any, total: float, count: float, exact: bool) -> None:
    one, other = as_pair("x", value)
    assert (float(one), float(other)) == (total, count)
    sums = Sums(CPU, exact)
    sums.add({"x": value})
    sums.add({"x": value})
    found, number = sums.reduce(ALONE)["x"]
    assert (float(found), number) == (2 * total, 2 * count)


@pytest.mark.parametrize("value", [torch.tensor(1.0), 1.0, "a", None, (1, 2, 3)])
def test_values_without_sum_and_count_are_rejected(value: Any) -> None:
    with pytest.raises(ContractError, match='"loss"'):
        as_pair("loss", value)


def test_a_validation_step_needs_no_loss() -> None:
    assert check_answer({"error": 1}, "validation_step") == {"error": 1}
    with pytest.raises(ContractError, match=r'training_step .*"loss"; .*error'):
        check_answer({"error": 1})


def test_exact_sums_do_not_depend_on_order_grouping_or_size() -> None:
    random = torch.Generator().manual_seed(3)
    scale = 10.0 ** torch.randint(-9, 9, (600,), generator=random)
    values = (torch.randn(600, generator=random, dtype=torch.float64) * scale).float()
    expected = None
    for pieces in (1, 7, 100, 600):
        for order in (torch.arange(600), torch.randperm(600, generator=random)):
            sums = Sums(CPU, exact=True)
            for piece in values[order].tensor_split(pieces):
                sums.add({"x": piece, "pair": (piece.double().sum() * 0 + len(piece), len(piece))})
            totals = sums.reduce(ALONE)
            found = (totals["x"][0].item(), totals["x"][1], totals["pair"][0].item())
            expected = expected or found
            assert found == expected
    assert expected is not None
    assert expected[0] == pytest.approx(math.fsum(values.tolist()), rel=1e-12)
    assert expected[1:] == (600, 600)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinite_metric_does_not_affect_other_metrics(bad: float, exact: bool) -> None:
    sums = Sums(CPU, exact)
    for value in (1.0, bad, 1.0):
        sums.add({"x": torch.tensor([value, 1.0]), "pair": (value, 1), "good": torch.tensor([2.0])})
    found = means(sums.reduce(ALONE))
    assert not math.isfinite(found["x"])
    assert not math.isfinite(found["pair"])
    assert found["good"] == 2.0
    sums.reset()
    sums.add({"x": torch.tensor([3.0]), "pair": (3, 1), "good": torch.tensor([2.0])})
    assert means(sums.reduce(ALONE))["x"] == 3.0  # the next interval is not affected


@pytest.mark.parametrize("exact", [False, True])
def test_sums_may_be_tensors_and_have_no_mean(exact: bool) -> None:
    sums = Sums(CPU, exact)
    sums.add({"confusion": (torch.tensor([[1.0, 2.0], [0.5, -4.0]]), 3), "loss": torch.tensor([1.0])})
    sums.add({"confusion": (torch.tensor([[1.0, 0.0], [0.25, 1e9]]), 2), "loss": torch.tensor([2.0])})
    totals = sums.reduce(ALONE)
    assert totals["confusion"][0].tolist() == [[2.0, 2.0], [0.75, 999999996.0]]
    assert totals["confusion"][1] == 5
    assert means(totals) == {"loss": 1.5}


@pytest.mark.parametrize("exact", [False, True])
def test_sums_of_an_open_interval_can_be_restored_on_other_ranks(exact: bool) -> None:
    parts = []
    for value in (0.1, 0.2, 0.7):
        sums = Sums(CPU, exact)
        sums.add({"x": torch.tensor([value]), "gone": torch.tensor([5.0])})
        parts.append(sums.state_dict())
    whole = Sums(CPU, exact)
    whole.add({"x": torch.tensor([100.0]), "new": torch.tensor([100.0])})
    whole.load_state_dicts(parts)  # the model was edited between the save and the restore
    assert means(whole.reduce(ALONE)) == pytest.approx({"x": 1 / 3, "new": math.nan}, nan_ok=True)


def test_grad_norm_and_learning_rate_belong_to_the_step(tmp_path: Path) -> None:
    job = make_job(steps=6, clip_norm=0.01, scheduler={"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2})
    succeed(job, tmp_path)
    assert column(tmp_path, "train/learning_rate") == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert all(norm > 0.01 for norm in column(tmp_path, "train/grad_norm"))  # before clipping
