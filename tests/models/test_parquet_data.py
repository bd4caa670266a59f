"""Parquet shards: every row once, few row groups in memory, and errors that name file and row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.parquet_data import GROUPS_KEPT, Parquet, Rows, Stream
from tests.support.command import Place


def write(file: Path, rows: int = 100, group: int = 10, first: int = 0, **columns: Any) -> Path:
    """Write a file whose row i is a = i, b = [2 i, 3 i] and y = i % 5; `columns` replace these."""
    number = np.arange(first, first + rows)
    table = {
        "a": number.astype(np.float64),
        "b": pa.array([[2.0 * n, 3.0 * n] for n in number], pa.list_(pa.float32())),
        "y": number % 5,
        **columns,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file, row_group_size=group)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards of 100 rows, the last with larger row groups."""
    for shard in range(3):
        write(tmp_path / "data" / f"part-{shard}.parquet", first=100 * shard, group=(10, 10, 40)[shard])
    return tmp_path / "data"


def test_rows_are_read_in_the_order_of_the_files(root: Path) -> None:
    data = Parquet(str(root), target="y")
    assert (data.features, len(data.train), len(data.val)) == (["a", "b"], 280, 20)
    assert data.train.blocks == [10] * 20 + [40, 40]
    x, y = data.train.__getitems__([279, 3, 105, 3, 0])
    assert x.tolist() == [[n, 2 * n, 3 * n] for n in (279, 3, 105, 3, 0)]
    assert (x.dtype, y.dtype, y.tolist()) == (torch.float32, torch.int64, [4, 3, 0, 3, 0])
    one, label = data.val[-1]
    assert (one.tolist(), int(label)) == ([299, 598, 897], 4)
    assert Parquet(str(root), target="a", features=["y"]).train[7][1].dtype == torch.float32


def test_validation_may_be_another_file(root: Path, tmp_path: Path) -> None:
    data = Parquet(str(root), target="y", val_root=str(write(tmp_path / "val.parquet", rows=7)))
    assert (len(data.train), len(data.val)) == (300, 7)


def test_few_row_groups_are_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.engine.order import BLOCKS, Order

    data = Parquet(str(root), target="y")
    read: list[int] = []
    inner = Rows._read

    def recording(self: Rows, number: int) -> Any:
        read.append(number)
        return inner(self, number)

    monkeypatch.setattr(Rows, "_read", recording)
    order = Order(280, 16, 0, blocks=torch.tensor(data.train.blocks)).epoch(1)
    for indices in order.split(16):
        data.train.__getitems__(indices.tolist())
    assert sorted(read) == list(range(22))  # each once per epoch
    assert len(data.train._kept) <= GROUPS_KEPT
    assert 2 * BLOCKS <= GROUPS_KEPT


@pytest.mark.parametrize("world_size", [1, 2, 5, 30])
def test_a_stream_gives_every_row_to_one_rank(root: Path, world_size: int) -> None:
    stream = Parquet(str(root), target="y", stream=True).train
    assert isinstance(stream, Stream)
    parts = [[x[:, 0] for x, _ in stream.stream(rank, world_size, seed=3)] for rank in range(world_size)]
    seen = torch.cat([piece for part in parts for piece in part])
    assert seen.sort().values.tolist() == list(range(280))
    again = torch.cat([x[:, 0] for x, _ in stream.stream(0, world_size, seed=4)])
    assert not torch.equal(again, torch.cat(parts[0]))


NET = """\
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 5)

    def training_step(self, batch):
        x, y = batch
        return {"loss": F.cross_entropy(self.out(x / 300), y, reduction="none")}
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(["cluster=none"], id="none"),
        # tests/runners/test_ray_train.py reads a stream through Ray in every run of the suite.
        pytest.param(["cluster=local", "scaling.workers=2", "data.stream=true"], id="local", marks=pytest.mark.slow),
    ],
)
def test_launch_trains_with_shards(how: list[str], root: Path, place: Place) -> None:
    root.rename(place.directory / "shards")  # relative paths must also work in the reading processes
    (place.directory / "five.py").write_text(NET)
    (place.directory / "own/model/five.yaml").write_text("_target_: five.Net\n")
    words = ["--config-dir", "own", "data=parquet", "data.root=shards", "data.target=y", "model=five"]
    settings = ["trainer.epochs=2", "trainer.global_batch_size=40", "logging.tensorboard=false", "run.name=shards"]
    ended = place.launch(*words, *settings, *how)
    assert ended.status == 0, ended.err
    result = place.result("shards")
    assert (result["status"], result["steps"], result["samples"]) == ("completed", 14, 560)


def test_inputs_need_no_target(root: Path, tmp_path: Path) -> None:
    data = Parquet(str(root), target="y", features=["a"])
    file = tmp_path / "asked.parquet"
    pq.write_table(pa.table({"a": [1.5, 2.5]}), file)
    inputs = data.inputs(str(file))
    assert inputs.__getitems__([1, 0]).tolist() == [[2.5], [1.5]]
    assert inputs.names == ["asked.parquet:0:0", "asked.parquet:0:1"]


@pytest.mark.parametrize(
    ("columns", "how", "words"),
    [
        ({}, {"target": "z"}, r"x\.parquet: .*\bz; .* a, b, y\b"),
        ({}, {"features": ["a", "q"]}, r"x\.parquet: .*\bq; .* a, b, y\b"),
        ({}, {"features": ["a", "y"]}, r"data\.features .*\by:"),
        ({"a": [float("nan") if n == 13 else 1.0 for n in range(100)]}, {}, r"x\.parquet, .*\b1, row 3: a\b"),
        ({"a": [None if n == 24 else 1 for n in range(100)]}, {}, r"x\.parquet, .*\b2, row 4: a\b"),
        ({"a": ["text"] * 100}, {}, r"\b0: a .*\bstring;"),
        ({"b": [[1.0] * (n % 2) for n in range(100)]}, {}, r"\b0: b "),
        ({"y": [[1.0, 2.0]] * 100}, {}, r"\b0: .*\by "),
        ({}, {"val_fraction": 1.0}, r"val_fraction=1.0"),
    ],
)
def test_bad_columns_are_reported_with_file_and_row(columns: Any, how: Any, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=words):
        Parquet(str(file), **{"target": "y", **how}).train.__getitems__(range(90))


def test_missing_and_invalid_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*nowhere "):
        Parquet(str(tmp_path / "nowhere"), target="y")
    with pytest.raises(FileNotFoundError, match=r"data\.root=.* \.parquet .*Parquet"):
        Parquet(str(tmp_path), target="y")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 invalid")
    with pytest.raises(ValueError, match=r"x\.parquet .*Parquet"):
        Parquet(str(tmp_path), target="y")
    with pytest.raises(ValueError, match=r"x\.parquet .*row_group_size"):
        Parquet(str(write(tmp_path / "one" / "x.parquet", group=100)), target="y")
    with pytest.raises(ValueError, match=r"data\.root=[^(]*Parquet\D*$"):
        Parquet(str(write(tmp_path / "none" / "x.parquet", rows=0, b=pa.array([], pa.list_(pa.float32())))), target="y")


def test_a_truncated_shard_is_reported_when_it_is_read(root: Path) -> None:
    data = Parquet(str(root), target="y")
    whole = (root / "part-1.parquet").read_bytes()
    (root / "part-1.parquet").write_bytes(b"\0" * (len(whole) - 2000) + whole[-2000:])
    with pytest.raises(ValueError, match=r"part-1\.parquet, .*\b0: "):
        data.train.__getitems__([105])
