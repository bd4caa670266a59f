"""Streaming training data: guarantees and rejected settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.engine_ranks import (
    Script,
    launch,
    make_job,
    succeed,
    trained,
)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_stream_is_trained_with_in_whole_batches(workers: int, tmp_path: Path) -> None:
    data = {"_target_": "Flowing", "train": 600}
    job = make_job(model={"_target_": "Net", "note": True}, data=data, epochs=2, microbatch_size=30)
    ranks = succeed(job, tmp_path, workers)
    seen = [[number for entry in trained(rank) if entry[0] == "losses" for number in entry[1]] for rank in ranks]
    assert sum(map(len, seen)) == 1200
    # Every rank has its own part. If ranks have equal shares of a batch, each sample occurs once in a pass; otherwise
    # a few samples are repeated or omitted.
    found = sorted(number for numbers in seen for number in numbers)
    assert len(set(found)) > 590
    assert workers == 3 or found == sorted(list(range(600)) * 2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["samples"], result["epochs"]) == (12, 1200, 2.0)


def test_a_resumed_stream_starts_another_pass(tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Flowing"}, epochs=1)
    succeed(job, tmp_path, 2, scripts=Script(stop_after=5))
    succeed(job, tmp_path, 3)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("raises", "kind", "words"),
    [
        ("value", "DataError", "shard-3.parquet, row 7"),
        ("bug", "UserCodeError", "KeyError"),
        ("empty", "DataError", "no samples for rank"),
    ],
)
def test_a_failing_stream_is_reported(raises: str, kind: str, words: str, tmp_path: Path) -> None:
    (rank,) = launch(make_job(data={"_target_": "Flowing", "raises": raises}), tmp_path)
    assert rank.error is not None
    assert rank.error[0] == kind
    assert words in rank.error[1]


def test_a_stream_is_refused_where_runs_must_agree_to_the_bit(tmp_path: Path) -> None:
    (rank,) = launch(make_job(data="Flowing", deterministic=True), tmp_path)
    assert rank.error is not None
    assert rank.error[0] == "ConfigError"
    assert "data.stream=false" in rank.error[1]
