"""Tables in Parquet shards of any size: row groups are read on demand, and a few of them are cached.

A sample is a row: x (F,) float32 from the feature columns (a column may hold lists of equal length, which are
concatenated), y from the target column, float32 or int64 as stored. Invalid data raise a ValueError or an OSError that
names the file, the row group and the column.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.file_limits import MAX_GROUP_BYTES, check_regular, check_size

Piece = tuple[Tensor, ...]
GROUPS_KEPT = 16  # row groups in memory: the engine shuffles within eight, and a batch may reach into the next eight


class Parquet:
    """A folder of Parquet files (or one file), the same columns in each.

    Validation is `val_root`, or the last row groups that hold at least `val_fraction` of the rows: shards in order of
    their names, so that rows which follow each other in time are not split at random.

    Args:
        features: columns of numbers; null: all except the target.
        stream: read training data as a stream of row groups instead of row by row in the engine's order, see
            `Stream.stream`: each row group is read by one worker, once, with weaker guarantees.
        num_workers: loader processes that read and decode.
    """

    def __init__(
        self,
        root: str,
        target: str,
        features: Sequence[str] | None = None,
        val_root: str | None = None,
        val_fraction: float = 0.1,
        stream: bool = False,
        num_workers: int = 0,
        max_group_bytes: int = MAX_GROUP_BYTES,
    ) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: must be between 0 and 1.")
        groups = _groups(root, "data.root", max_group_bytes)
        columns = _columns(groups[0][0], target, features)
        if val_root is not None:
            train, val = groups, _groups(val_root, "data.val_root", max_group_bytes)
        else:
            counts = list(accumulate(count for _, _, count in groups))
            cut = next(i for i, seen in enumerate(counts, start=1) if seen >= (1 - val_fraction) * counts[-1])
            train, val = groups[: min(cut, len(groups) - 1)], groups[min(cut, len(groups) - 1) :]
            if not train:
                raise ValueError(
                    f"{root} has a single row group, so none remains for validation. Write smaller ones "
                    "(row_group_size), or name other data with data.val_root."
                )
        self.features, self.target, self.num_workers = columns, target, num_workers
        self._max_group_bytes = max_group_bytes
        self.train: Rows = Stream(train, columns, target) if stream else Rows(train, columns, target)
        self.val = Rows(val, columns, target)

    def inputs(self, path: str) -> Rows:
        """Return the rows of a Parquet file or a folder of files; no target is needed."""
        return Rows(_groups(path, "input", self._max_group_bytes), self.features, None)


class Rows(Dataset[Piece]):
    """The rows of row groups (file, number of the group, rows). `blocks` are the groups' sizes, `names` file:row."""

    def __init__(self, groups: Sequence[tuple[str, int, int]], features: Sequence[str], target: str | None) -> None:
        self.groups, self.features, self.target = list(groups), list(features), target
        self.blocks = [count for _, _, count in self.groups]
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._kept: OrderedDict[int, Piece] = OrderedDict()
        self._files: dict[tuple[int, str], Any] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Piece:
        return tuple(part[0] for part in self.__getitems__([range(len(self))[index]]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """x (B, F), y (B,); x alone without a target."""
        rows = np.asarray(indices)
        where = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(where, kind="stable")
        found = []
        for group in np.unique(where):
            chosen = torch.from_numpy(rows[order][where[order] == group] - self._starts[group])
            found.append(tuple(part[chosen] for part in self._group(int(group))))
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        parts = tuple(torch.cat(part)[back] for part in zip(*found, strict=True))
        return parts if self.target is not None else parts[0]

    @property
    def names(self) -> list[str]:
        return [f"{Path(file).name}:{group}:{row}" for file, group, count in self.groups for row in range(count)]

    def _group(self, number: int) -> Piece:
        piece = self._kept.get(number)
        if piece is None:
            piece = self._kept[number] = self._read(number)
            if len(self._kept) > GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return piece

    def _read(self, number: int) -> Piece:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, group, _ = self.groups[number]
        # A forked loader process opens its own files, and reads in its own thread: pyarrow's threads do not survive a
        # fork.
        key = os.getpid(), path
        columns = [*self.features, *([self.target] if self.target is not None else [])]
        try:
            if key not in self._files:
                self._files[key] = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
            table = self._files[key].read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}, row group {group}: cannot be read: {' '.join(str(error).split())}.") from error
        return self.tensors(table, f"{path}, row group {group}")

    def tensors(self, table: Any, where: str) -> Piece:
        """Return x (B, F) float32 and y (B,) of a pyarrow Table with the columns."""
        missing = [name for name in (*self.features, self.target) if name and name not in table.column_names]
        if missing:
            raise ValueError(f"{where}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}.")
        x = [_matrix(table.column(name), name, where) for name in self.features]
        joined = torch.from_numpy(np.concatenate(x, axis=1, dtype=np.float32, casting="unsafe"))
        if self.target is None:
            return (joined,)
        y = _matrix(table.column(self.target), self.target, where)
        if y.shape[1] != 1:
            raise ValueError(f"{where}: the target {self.target} holds lists; one number per row is needed.")
        kind = np.int64 if np.issubdtype(y.dtype, np.integer) else np.float32
        return joined, torch.from_numpy(y[:, 0].astype(kind))


class Stream(Rows):
    """`Rows` that the engine reads as a stream when it trains."""

    def stream(
        self, rank: int, world_size: int, seed: int, apply: Callable[..., Iterator[Any]] = map
    ) -> Iterator[Piece]:
        """Yield the rows of one pass, in pieces: row groups in a random order, each shuffled, distributed over the
        ranks.

        Args:
            apply: yields a function's results for items in their order, like `map`; it may run on other nodes.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        whole = len(order) >= world_size  # with fewer groups than ranks each rank reads some rows of every group
        mine = [self.groups[number] for number in (order[rank::world_size] if whole else order)]
        groups = [(os.path.abspath(file), group, count) for file, group, count in mine]
        for piece in apply(partial(_read_group, self.features, self.target), groups):
            rows = torch.randperm(len(piece[0]), generator=generator)
            rows = rows if whole else rows[rank::world_size]
            yield tuple(part[rows] for part in piece)


def _read_group(features: Sequence[str], target: str | None, group: tuple[str, int, int]) -> Piece:
    return Rows([group], features, target)._read(0)


def _groups(root: str, key: str, max_bytes: int) -> list[tuple[str, int, int]]:
    """Return (file, number, rows) of every row group that is not empty, in the order of the files' names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = Path(root).expanduser()
    files = sorted(file for file in place.rglob("*.parquet")) if place.is_dir() else [place] * place.is_file()
    if not files:
        found = "holds no .parquet file" if place.is_dir() else "does not exist"
        raise FileNotFoundError(f"{key}={root} {found} ({place.absolute()}); it should be a Parquet file or a folder.")
    groups = []
    for file in files:
        try:
            metadata = pq.read_metadata(check_regular(file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a Parquet file, or damaged: {' '.join(str(error).split())}.") from error
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            # The stated size does not include values repeated by encodings; a decoded number has at most eight bytes.
            decoded = max(group.total_byte_size, 8 * group.num_rows * group.num_columns)
            check_size(f"{file}, row group {i},", decoded, max_bytes, "bytes", "max_group_bytes")
            groups.append((str(file), i, group.num_rows))
    groups = [group for group in groups if group[2]]
    if not groups:
        raise ValueError(f"{key}={root}: its Parquet files have no rows.")
    return groups


def _columns(file: str, target: str, features: Sequence[str] | None) -> list[str]:
    import pyarrow.parquet as pq

    names = pq.read_schema(file).names
    chosen = [name for name in names if name != target] if features is None else [str(name) for name in features]
    missing = [name for name in (target, *chosen) if name not in names]
    if missing or not chosen:
        what = f"no column {', '.join(missing)}" if missing else "no column except the target"
        raise ValueError(f"{file}: {what}; there are {', '.join(names)}. Set data.features and data.target.")
    if target in chosen:
        raise ValueError(f"data.features has the target, {target}: the model would receive the answer as input.")
    return chosen


def _matrix(column: Any, name: str, where: str) -> np.ndarray:
    """Return a column as (B, k): numbers are (B, 1), lists of one length k are (B, k)."""
    import pyarrow as pa

    array = column.combine_chunks()
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{where}, row {row}: {name} is empty; a number is needed.")
    rows, values = len(array), array
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        values = array.flatten()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)):
        raise ValueError(f"{where}: {name} holds {array.type}; numbers, or lists of numbers, are needed.")
    numbers = values.to_numpy(zero_copy_only=False)
    if rows == 0 or len(numbers) % rows or (values is not array and len(set(map(len, array))) > 1):
        raise ValueError(f"{where}: {name} holds lists of different lengths; all must have the same.")
    matrix = numbers.reshape(rows, -1)
    if np.issubdtype(matrix.dtype, np.floating) and not np.isfinite(matrix).all():
        row = int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])
        raise ValueError(f"{where}, row {row}: {name} is not a finite number.")
    if matrix.dtype == bool:
        matrix = matrix.astype(np.int64)
    return matrix
