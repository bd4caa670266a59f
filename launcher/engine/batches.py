"""Batches, whatever the data set makes them of: on the device, in its memory layout, cut and joined.

The type of a batch is kept, and of everything within it. A batch in which nothing changes stays the same object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from launcher.errors import DataError

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def tree_map(function: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Apply `function` to every tensor within a batch: in mappings, sequences, dataclasses, attrs classes, namespaces.

    Args:
        is_leaf: chooses what else is handed to `function`, and not looked into.
    """
    if isinstance(batch, torch.Tensor) or (is_leaf is not None and is_leaf(batch)):
        return function(batch)
    if batch is None or isinstance(batch, (str, bytes, bytearray, int, float, type)):
        return batch
    if isinstance(batch, Mapping):
        before = dict(batch.items())
        return _mapping(batch, before, {key: tree_map(function, value, is_leaf) for key, value in before.items()})
    if isinstance(batch, (tuple, MutableSequence)):
        return _sequence(batch, [tree_map(function, value, is_leaf) for value in batch])
    return _object(batch, {name: tree_map(function, getattr(batch, name), is_leaf) for name in _names(batch)})


def leaves(batch: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """Return every tensor within a batch, and what `is_leaf` chooses, in the order of `tree_map`."""
    found: list[Any] = []

    def note(value: Any) -> Any:
        found.append(value)
        return value

    tree_map(note, batch, is_leaf)
    return found


def _mapping(batch: Mapping[Any, Any], before: dict[Any, Any], items: dict[Any, Any]) -> Any:
    if all(items[key] is before[key] for key in items):
        return batch
    if type(batch) is dict:
        return items
    if isinstance(batch, MutableMapping):
        clone = copy.copy(batch)  # with its attributes, such as a default factory or the encodings of a tokenizer
        for key, value in items.items():
            clone[key] = value
        return clone
    try:
        return type(batch)(items)  # type: ignore[call-arg]
    except TypeError as error:
        raise DataError(
            f"A batch holds a {type(batch).__name__}, which cannot be made again from its items. Give that class a "
            "method to(device) that returns it on the device, or let `collate` return a dictionary."
        ) from error


def _sequence(batch: Any, values: list[Any]) -> Any:
    if all(new is old for new, old in zip(values, batch, strict=True)):
        return batch
    if isinstance(batch, MutableSequence):
        clone: Any = copy.copy(batch)
        for number, value in enumerate(values):
            clone[number] = value
        return clone
    try:
        clone = tuple.__new__(type(batch), values)  # a named tuple, too
    except TypeError:  # what torch.max returns
        return type(batch)(values)
    if getattr(batch, "__dict__", None):
        vars(clone).update(vars(batch))
    return clone


def _names(batch: Any) -> Sequence[str]:
    if is_dataclass(batch):
        return [field.name for field in fields(batch) if hasattr(batch, field.name)]
    if isinstance(batch, SimpleNamespace):
        return list(vars(batch))
    return [attribute.name for attribute in getattr(type(batch), "__attrs_attrs__", ())]


def _object(batch: Any, values: dict[str, Any]) -> Any:
    changed = {name: value for name, value in values.items() if value is not getattr(batch, name)}
    if not changed:
        return batch
    clone = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(clone, name, value)  # its constructor does not run again, and it may be frozen
    return clone


# ---- on the device --------------------------------------------------------------------------------------------------


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch on `device`. An object with a method `to` moves itself.

    From pageable memory to a GPU plain tensors pass through pinned memory, to copy at once.
    """

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (_pinned(value) if device.type == "cuda" else value).to(device, non_blocking=True)
        moved = value.to(device)
        return value if moved is None else moved  # in place

    return tree_map(one, batch, lambda value: _has(value, "to"))


def pin(batch: Any) -> Any:
    """Return the batch in pinned memory, from which it is copied to a GPU while that computes.

    An object with a method `pin_memory` pins itself.
    """

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _pinned(value)
        pinned = value.pin_memory()
        return value if pinned is None else pinned

    return tree_map(one, batch, lambda value: _has(value, "pin_memory"))


def _has(value: Any, method: str) -> bool:
    return callable(getattr(type(value), method, None))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    wanted = _is_dense(tensor) and type(tensor) in _PLAIN and tensor.device.type == "cpu"
    return tensor.pin_memory() if wanted and not tensor.is_pinned() else tensor


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def channels_last(batch: Any) -> Any:
    """Return the batch with its pictures (floating, 4-D) in channels-last memory, which convolutions read faster."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not _is_dense(tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            return tensor
        if type(tensor) in _PLAIN:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.to(memory_format=torch.channels_last)  # which keeps a subclass

    return tree_map(one, batch)


# ---- by samples -----------------------------------------------------------------------------------------------------


def rows(batch: Any) -> int:
    """Return how many samples a batch has whose tensors, arrays and lists of values have one row a sample."""
    return len(_columns(batch)[0])


def cut(batch: Any, start: int, stop: int | None = None) -> Any:
    """Return samples `start` … `stop` of such a batch."""
    return tree_map(lambda value: value[start:stop], batch, _has_rows)


def join(batches: Sequence[Any]) -> Any:
    """Return one batch with the samples of several."""
    parts = zip(*map(_columns, batches), strict=True)
    return tree_map(lambda _: _joined(next(parts)), batches[0], _has_rows)


def _columns(batch: Any) -> list[Any]:
    return leaves(batch, _has_rows)


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else [item for value in values for item in value]


def _has_rows(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (type(value) is list and not leaves(value))
