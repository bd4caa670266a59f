"""Moves, pins, slices and joins batches of any type: nested containers, dataclasses, objects with `.to(device)`.

The result has the type of the input, at every level. A batch in which nothing changes is returned as the same object.
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
    """Apply `function` to every tensor of a batch.

    Mappings, sequences, dataclasses, attrs classes and namespaces are searched recursively.

    Args:
        is_leaf: returns whether a value that is not a tensor is passed to `function` instead of being searched.
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
    """Return every tensor of a batch, and the values that `is_leaf` selects, in the order of `tree_map`."""
    found: list[Any] = []

    def collect(value: Any) -> Any:
        found.append(value)
        return value

    tree_map(collect, batch, is_leaf)
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
            f"A batch holds a {type(batch).__name__}, which cannot be rebuilt from its items. Give that class a "
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
        clone = tuple.__new__(type(batch), values)  # also builds a named tuple
    except TypeError:  # a structseq, such as the result of torch.max
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
        object.__setattr__(clone, name, value)  # without the constructor; works for frozen dataclasses
    return clone


# ---- on the device --------------------------------------------------------------------------------------------------


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch on `device`. An object with a method `to` is moved by that method.

    For a GPU, plain tensors in pageable memory are pinned first, so that the copy is asynchronous.
    """

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (_pinned(value) if device.type == "cuda" else value).to(device, non_blocking=True)
        moved = value.to(device)
        return value if moved is None else moved  # None: moved in place

    return tree_map(one, batch, lambda value: _has(value, "to"))


def pin(batch: Any) -> Any:
    """Return the batch in pinned memory, from which copies to a GPU overlap with computation.

    An object with a method `pin_memory` is pinned by that method.
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
    can_pin = _is_dense(tensor) and type(tensor) in _PLAIN and tensor.device.type == "cpu"
    return tensor.pin_memory() if can_pin and not tensor.is_pinned() else tensor


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def channels_last(batch: Any) -> Any:
    """Return the batch with its images (floating point, 4-D) in channels-last layout, which speeds up convolutions."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not _is_dense(tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            return tensor
        if type(tensor) in _PLAIN:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.to(memory_format=torch.channels_last)  # preserves a subclass

    return tree_map(one, batch)


# ---- samples --------------------------------------------------------------------------------------------------------


def rows(batch: Any) -> int:
    """Return the number of samples of a batch whose tensors, arrays and lists have one row per sample."""
    return len(_columns(batch)[0])


def cut(batch: Any, start: int, stop: int | None = None) -> Any:
    """Return the samples [start, stop) of a batch; see `rows`."""
    return tree_map(lambda value: value[start:stop], batch, _has_rows)


def join(batches: Sequence[Any]) -> Any:
    """Concatenate several batches into one; see `rows`."""
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
