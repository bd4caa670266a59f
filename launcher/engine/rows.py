"""Collects one entry per sample from all workers, for metrics over all predictions and for files of predictions.

`validation_step` may return `rows`: a tensor (B, …), a list of B entries, or a mapping of names to such columns. Rank 0
gets the entries of all samples in the order of the data set, each once, for any number of workers.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.engine import objects
from launcher.engine.metrics import ContractError
from launcher.engine.runtime import Runtime
from launcher.errors import CheckpointError

Column = Tensor | list[Any]
Kinds = dict[str, list[Any]]  # the kind of each column: [dtype, shape of an entry] of a tensor, [] of a list

IN_MEMORY = 256 * 2**20  # bytes of the tensors of one set that stay in memory; larger ones are mapped from a file
_MESSAGE = 16 * 2**20  # bytes of tensors, or…
_ENTRIES = 4096  # …entries of lists, in one message to rank 0
_SINGLE = ""  # the name of the column where `rows` is not a mapping


def columns_of(rows: Any, samples: int | None = None) -> dict[str, Column]:
    """Return `rows` of one batch as columns: tensors on the CPU and lists.

    Args:
        samples: number of samples of the batch, if it is known.

    Raises:
        ContractError: `rows` does not have one entry per sample.
    """
    named = rows if isinstance(rows, Mapping) else {_SINGLE: rows}
    columns: dict[str, Column] = {}
    for name, value in named.items():
        where = f'rows["{name}"]' if name != _SINGLE else "rows"
        if isinstance(value, Tensor) and value.ndim and value.layout is torch.strided:
            columns[str(name)] = value.detach().cpu()
        elif isinstance(value, (list, tuple)):
            columns[str(name)] = [_plain(entry) for entry in value]
        else:
            found = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ContractError(
                f"validation_step must return one entry per sample in {where}: a tensor (B, …) or a list of B entries; "
                f"found a {found}."
            )
        expected = samples if samples is not None else len(next(iter(columns.values())))
        if len(columns[str(name)]) != expected:
            raise ContractError(
                f"validation_step must return one entry per sample in {where}: {expected} for this batch; found "
                f"{len(columns[str(name)])}."
            )
    return columns


def kinds_of(columns: Mapping[str, Column]) -> Kinds:
    """Return what must be equal in all batches: names, and the dtype and the shape of an entry of each tensor."""
    return {
        name: [str(one.dtype).removeprefix("torch."), list(one.shape[1:])] if isinstance(one, Tensor) else []
        for name, one in columns.items()
    }


def check_same_kinds(expected: Kinds, found: Kinds) -> None:
    """Raise ContractError if the rows of two batches differ in kind."""
    if expected == found:
        return
    names = ", ".join(f'"{name}"' for name in sorted(expected.keys() ^ found.keys()) if name)
    if names:
        raise ContractError(
            f"validation_step must return the same columns in `rows` for every batch; the batches differ in {names}."
        )
    name = next(name for name in expected if expected[name] != found[name])
    where = f' in the column "{name}"' if name != _SINGLE else ""
    raise ContractError(
        f"validation_step must return rows of one kind for every batch; found {_described(expected[name])} and "
        f"{_described(found[name])}{where}. Return a list of tensors if their shapes differ."
    )


def check_packable(columns: Mapping[str, Column]) -> None:
    """Raise ContractError if the entries cannot be sent to another worker."""
    try:
        objects.pack(dict(columns))
    except CheckpointError as error:
        raise ContractError(
            f"validation_step must return rows of tensors, numbers, text, or lists and mappings of them: {error}"
        ) from error


def whole_of(columns: dict[str, Column]) -> Column | dict[str, Column]:
    """Return columns in the form in which the model returned them."""
    return columns[_SINGLE] if list(columns) == [_SINGLE] else columns


class Rows:
    """Collects the rows of one data set.

    Args:
        samples: number of samples of this rank.
        folder: where tensors are kept that are too large for the memory.
    """

    def __init__(self, samples: int, folder: Path) -> None:
        self._samples, self._folder = samples, folder
        self._indices = torch.empty(samples, dtype=torch.int64)
        self._columns: dict[str, Column] = {}
        self._kinds: Kinds | None = None
        self._filled = 0

    def add(self, indices: Tensor, rows: Any) -> None:
        """Add the rows of one batch.

        Args:
            indices: the numbers of its samples in the data set, int64 (B,).

        Raises:
            ContractError: `rows` does not have one entry per sample, or differs in kind from those of earlier batches.
        """
        columns, count = columns_of(rows, len(indices)), len(indices)
        kinds = kinds_of(columns)
        if self._kinds is None:
            self._kinds = kinds
            self._columns = {name: _storage(kind, self._samples, self._folder) for name, kind in kinds.items()}
        check_same_kinds(self._kinds, kinds)
        self._indices[self._filled : self._filled + count] = indices
        for name, values in columns.items():
            _put(self._columns[name], slice(self._filled, self._filled + count), values)
        self._filled += count

    def collect(self, runtime: Runtime, length: int) -> Column | dict[str, Column] | None:
        """Return the rows of all samples on rank 0, in the order of the data set; None on other ranks. A collective.

        Args:
            length: number of samples of the data set.

        Returns:
            A tensor (length, …) or a list, or a dictionary of them if the model returned a mapping; None if the model
            returned no rows.

        Raises:
            ContractError: on every rank, if the rows differ in kind between ranks.
        """
        everyone = [kinds for kinds in runtime.gather(self._kinds) if kinds is not None]
        for kinds in everyone[1:]:
            check_same_kinds(everyone[0], kinds)
        if not everyone:
            return None
        whole: dict[str, Column] = {}
        if runtime.is_first:
            whole = {name: _storage(kind, length, self._folder) for name, kind in everyone[0].items()}
        pieces = self._pieces()
        rounds = max(runtime.gather(len(pieces)))
        for number in range(rounds):
            own = self._piece(*pieces[number]) if number < len(pieces) else None
            received = [own] if runtime.alone else objects.gather(own, runtime.host_group)
            for piece in received or ():
                if piece is not None:
                    indices, columns = piece
                    for name, values in columns.items():
                        _put(whole[name], indices, values)
        if not runtime.is_first:
            return None
        return whole_of(whole)

    def _pieces(self) -> list[tuple[int, int]]:
        """Return the parts [start, stop) in which this rank sends its rows."""
        tensors = [one for one in self._columns.values() if isinstance(one, Tensor)]
        size = sum(one[0].nbytes for one in tensors) if self._filled else 0
        step = max(1, min(_MESSAGE // max(1, size), _ENTRIES if len(tensors) < len(self._columns) else _MESSAGE))
        return [(start, min(start + step, self._filled)) for start in range(0, self._filled, step)]

    def _piece(self, start: int, stop: int) -> tuple[Tensor, dict[str, Column]]:
        return self._indices[start:stop], {name: values[start:stop] for name, values in self._columns.items()}


def entries(column: Column) -> Iterator[Any]:
    """Yield the entries of a column as plain Python values."""
    for entry in column:
        yield _as_plain(entry)


def _plain(entry: Any) -> Any:
    """Return an entry of a list with its tensors on the CPU."""
    if isinstance(entry, Tensor):
        return entry.detach().cpu()
    if isinstance(entry, Mapping):
        return {str(key): _plain(value) for key, value in entry.items()}
    return [_plain(value) for value in entry] if isinstance(entry, (list, tuple)) else entry


def _as_plain(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        return entry.tolist()
    if isinstance(entry, dict):
        return {key: _as_plain(value) for key, value in entry.items()}
    return [_as_plain(value) for value in entry] if isinstance(entry, list) else entry


def _storage(kind: list[Any], length: int, folder: Path) -> Column:
    """Return an empty column. A large tensor is mapped from a file that is removed at once, so none is left behind."""
    if not kind:
        return [None] * length
    dtype, shape = getattr(torch, kind[0]), (length, *kind[1])
    count = math.prod(shape)
    if count * dtype.itemsize <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    place = folder if folder.is_dir() else Path(tempfile.gettempdir())  # other machines may not have the folder
    handle, path = tempfile.mkstemp(prefix="rows-", suffix=".tmp", dir=place)
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=count, dtype=dtype).reshape(shape)
    finally:
        os.unlink(path)


def _put(column: Column, where: slice | Tensor, values: Column) -> None:
    if isinstance(column, Tensor):
        assert isinstance(values, Tensor)
        column[where] = values
    elif isinstance(where, slice):
        column[where] = values
    else:
        for index, value in zip(where.tolist(), values, strict=True):
            column[index] = value


def _described(kind: list[Any]) -> str:
    return f"tensors of {kind[0]} with entries of shape {tuple(kind[1])}" if kind else "lists"
