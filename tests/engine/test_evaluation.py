"""Validation and test use every sample once, for any number of workers and samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import engine_toys as toys
from tests.support.engine_ranks import Rank, final_weights, launch, logged, make_job, result_of, succeed

pytestmark = pytest.mark.gpu


def by_hand(directory: Path, count: int, seed: int) -> tuple[float, float]:
    """Return the mean loss and the accuracy of the final weights on a set of `Points`."""
    model = toys.Net()
    model.load_state_dict(final_weights(directory))
    x, y, _ = toys.points(count, seed)
    with torch.no_grad():
        logits = model(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


def totals(ranks: list[Rank]) -> list[list[Any]]:
    return [[entry for entry in rank.record if entry[0] == "totals"] for rank in ranks]


@pytest.mark.parametrize(
    ("workers", "how"),
    [(1, {}), (2, {"microbatch_size": 7}), (3, {}), (4, {}), (4, {"deterministic": True})],
    ids=["1", "2 in microbatches", "3", "4", "4 deterministic"],
)
def test_each_sample_of_each_set_counts_once(workers: int, how: dict[str, Any], tmp_path: Path) -> None:
    # 203 samples are not divisible by the batch or the workers, and 3 samples are fewer than four workers.
    job = make_job(model="Summary", data={"_target_": "Points", "several": True}, epochs=1, log_every="1ep", **how)
    ranks = succeed(job, tmp_path, workers)
    values = logged(tmp_path)[11]
    for name, count, seed in (("near", 203, 2), ("far", 3, 3)):
        loss, accuracy = by_hand(tmp_path, count, seed)
        assert values[f"val/{name}/loss"] == pytest.approx(loss, abs=1e-6)
        assert values[f"val/{name}/right"] == pytest.approx(accuracy, abs=1e-9)
        assert values[f"val/{name}/count"] == count
        assert f"val/{name}/confusion" not in values  # a tensor of sums is for `summarize`
    # `summarize` is called once, on the global totals.
    near, far = totals(ranks)[0]
    assert sum(map(sum, near[1])) == near[2] == 203
    assert sum(map(sum, far[1])) == far[2] == 3
    assert not any(totals(ranks)[1:])


def test_evaluation_restores_the_mode_of_every_module(tmp_path: Path) -> None:
    ranks = succeed(make_job(model="Resting", epochs=1, evaluate_every=2), tmp_path)
    modes = {entry[1:] for entry in ranks[0].record if entry[0] == "modes"}
    assert modes == {(True, False, True)}


def test_evaluation_has_no_effect_on_training(tmp_path: Path) -> None:
    model = {"_target_": "Net", "dropout": 0.5}
    for every in (1, "1ep"):
        succeed(make_job(model=model, epochs=1, evaluate_every=every), tmp_path / str(every))
    often, seldom = (final_weights(tmp_path / str(every)) for every in (1, "1ep"))
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_a_checkpoint_is_evaluated_on_validation_and_test_sets(tmp_path: Path) -> None:
    job = make_job(epochs=1)
    succeed(job, tmp_path, 2)
    before = result_of(tmp_path)
    for workers in (1, 3):
        weights = str(tmp_path / "checkpoints" / "step-00000011")
        ranks = succeed(job, tmp_path, workers, action="evaluate", weights=weights)
        found = ranks[0].result
        assert found.keys() == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
        assert found["val/loss"] == pytest.approx(logged(tmp_path)[11]["val/loss"], abs=1e-6)
        loss, accuracy = by_hand(tmp_path, 17, 4)
        assert (found["test/loss"], found["test/accuracy"]) == pytest.approx((loss, accuracy), abs=1e-6)
        assert all(rank.result == {} for rank in ranks[1:])
    assert result_of(tmp_path) == before  # evaluating a run does not change it


def test_an_invalid_result_of_summarize_is_reported(tmp_path: Path) -> None:
    (rank,) = launch(make_job(model="Talkative", epochs=1), tmp_path)
    assert rank.error is not None
    assert re.search(r" str\.$", rank.error[1])
