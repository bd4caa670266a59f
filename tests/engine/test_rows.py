"""Rows: one entry per sample from all workers, in the order of the data set, for exact metrics over all predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pyarrow import parquet
from sklearn.metrics import roc_auc_score

from launcher.engine import checkpoint, rows
from launcher.engine.estimate import estimate
from launcher.engine.metrics import ContractError
from launcher.engine.rows import Rows, check_same_kinds, columns_of, kinds_of
from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError
from tests.engine.test_start_check import refused
from tests.support import engine_toys as toys
from tests.support.engine_ranks import Rank, final_weights, launch, logged, make_job, on_ranks, succeed

DATA = {"_target_": "Points", "val": 1037}


def collected(rank: Rank) -> list[Any]:
    return [entry[1] for entry in rank.record if entry[0] == "rows"]


def scores_by_hand(directory: Path, count: int = 1037) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the score of each validation sample by the final weights (N,), and whether it is positive (N,)."""
    model = toys.Net()
    model.load_state_dict(final_weights(directory))
    x, y, _ = toys.points(count, 2)
    with torch.no_grad():
        return model(x).softmax(1)[:, 1].double(), y == 1


@pytest.mark.parametrize(("workers", "how"), [(1, {}), (2, {"microbatch_size": 13}), (3, {"deterministic": True})])
def test_auroc_over_all_samples_is_that_of_scikit_learn(workers: int, how: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(model="Predictions", data=DATA, steps=3, evaluate_every=3, **how)
    ranks = succeed(job, tmp_path, workers)
    (found,) = collected(ranks[0])
    assert not any(collected(rank) for rank in ranks[1:])
    assert found["name"] == [f"sample {number}" for number in range(1037)]
    score, positive = scores_by_hand(tmp_path)
    torch.testing.assert_close(found["score"], score, atol=1e-6, rtol=0)
    assert torch.equal(found["positive"], positive)
    auroc = logged(tmp_path)[3]["val/auroc"]
    assert auroc == pytest.approx(roc_auc_score(found["positive"].numpy(), found["score"].numpy()), abs=1e-12)


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_rows_may_be_a_tensor_or_a_list(form: str, tmp_path: Path) -> None:
    job = make_job(model={"_target_": "Predictions", "form": form}, steps=2, evaluate_every=2)
    (found,) = collected(succeed(job, tmp_path, 2)[0])
    score, _ = scores_by_hand(tmp_path, 203)
    if form == "tensor":
        assert torch.equal(found[:, 0], torch.arange(203).double())
        torch.testing.assert_close(found[:, 1], score, atol=1e-6, rtol=0)
    else:
        assert [entry["number"] for entry in found] == list(range(203))
        logits = torch.stack([entry["logits"] for entry in found])
        torch.testing.assert_close(logits.softmax(1)[:, 1].double(), score, atol=1e-6, rtol=0)


def test_large_rows_are_mapped_from_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    whole = Rows(50, tmp_path)
    with mock.patch.object(rows, "IN_MEMORY", 100), mock.patch.object(rows, "_MESSAGE", 64):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        for some in order.split(7):
            x, text = some[:, None].float().repeat(1, 3), [str(number) for number in some.tolist()]
            whole.add(some, {"x": x, "flag": some % 2 == 0, "text": text})
        found: Any = whole.collect(Runtime.single("cpu"), 50)
    assert torch.equal(found["x"], torch.arange(50.0)[:, None].repeat(1, 3))
    assert torch.equal(found["flag"], torch.arange(50) % 2 == 0)
    assert found["text"] == [str(number) for number in range(50)]
    assert list(tmp_path.iterdir()) == []


def mixed(runtime: Runtime, folder: str) -> str:
    own = Rows(2, Path(folder))
    own.add(torch.arange(2) + 2 * runtime.rank, torch.zeros(2, 3 + runtime.rank))
    try:
        own.collect(runtime, 4)
    except ContractError as error:
        return str(error)
    return ""


def test_ranks_with_rows_of_unequal_kinds_fail_together(tmp_path: Path) -> None:
    messages = on_ranks(mixed, 2, str(tmp_path))
    assert all("(3,)" in message and "(4,)" in message for message in messages)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 1), [1, 2, 3], {"a": [1, 2], "b": [1, 2, 3]}, torch.tensor(1.0), "ab", 5, None]
)
def test_rows_without_one_entry_per_sample_are_refused(wrong: Any) -> None:
    with pytest.raises(ContractError):
        columns_of(wrong, 2)


def test_batches_of_unequal_kinds_are_refused() -> None:
    first = kinds_of(columns_of({"a": torch.zeros(2), "b": ["x", "y"]}))
    check_same_kinds(first, kinds_of(columns_of({"a": torch.ones(5), "b": list("abcde")})))
    for other in ({"a": torch.zeros(2)}, {"a": torch.zeros(2).long(), "b": ["x", "y"]}, {"a": [1, 2], "b": ["x", "y"]}):
        with pytest.raises(ContractError) as caught:
            check_same_kinds(first, kinds_of(columns_of(other)))
        assert '"b"' in str(caught.value) or '"a"' in str(caught.value)


# ---- before the start -----------------------------------------------------------------------------------------------


def test_a_summary_that_needs_both_classes_does_not_stop_the_start() -> None:
    found = estimate(make_job(model="Predictions", checkpoint={"monitor": "val/auroc", "mode": "max"}), workers=2)
    assert any("summarize" in note for note in found.notes)
    assert "val/loss" in found.tags


def test_a_monitored_metric_that_no_evaluation_returns_ends_the_run(tmp_path: Path) -> None:
    job = make_job(model="Predictions", steps=2, checkpoint={"monitor": "val/aurok", "mode": "max"})
    for rank in launch(job, tmp_path, 2):
        assert rank.error is not None
        assert rank.error[0] == "TrainingError"
        assert "val/aurok" in rank.error[1]
        assert "val/auroc" in rank.error[1]


def test_a_summary_that_works_is_checked() -> None:
    job = make_job(model={"_target_": "Predictions", "form": "list"})
    assert "val/rows" in estimate(job, workers=2).tags
    with pytest.raises(ConfigError) as caught:
        estimate(replace(job, checkpoint=replace(job.checkpoint, monitor="val/row")), workers=2)
    assert "val/rows" in str(caught.value)


WRONG = [("none", "summarize"), ("count", "rows"), ("object", "object"), ("kind", "rows")]


@pytest.mark.parametrize(("how", "quoted"), WRONG)
def test_wrong_rows_are_refused_before_the_start(how: str, quoted: str) -> None:
    assert quoted in refused("WrongRows", how=how)


# ---- launch evaluate NAME rows=PATH ---------------------------------------------------------------------------------


def test_evaluate_writes_the_rows_of_all_sets(tmp_path: Path) -> None:
    job = make_job(model="Predictions", steps=2)
    succeed(job, tmp_path / "run", 2)
    path = checkpoint.newest_intact(tmp_path / "run" / "checkpoints").path
    assert path is not None
    file = tmp_path / "rows.parquet"
    succeed(job, tmp_path / "run", 2, action="evaluate", weights=str(path), rows=str(file))
    table = parquet.read_table(file).to_pydict()
    assert table["set"] == ["val"] * 203 + ["test"] * 17
    assert table["index"] == [*range(203), *range(17)]
    assert table["name"] == [f"sample {number}" for number in table["index"]]
    score, positive = scores_by_hand(tmp_path / "run", 203)
    assert table["score"][:203] == pytest.approx(score.tolist(), abs=1e-6)
    assert table["positive"][:203] == positive.tolist()
    assert sorted(file.name for file in tmp_path.iterdir() if not file.is_dir()) == ["rows.parquet"]


def test_evaluate_names_a_model_without_rows(tmp_path: Path) -> None:
    job = make_job(steps=1)
    succeed(job, tmp_path / "run", 1)
    path = checkpoint.newest_intact(tmp_path / "run" / "checkpoints").path
    (rank,) = launch(job, tmp_path / "run", 1, action="evaluate", weights=str(path), rows=str(tmp_path / "x.parquet"))
    assert rank.error is not None
    assert rank.error[0] == "ConfigError"
    assert not (tmp_path / "x.parquet").exists()
