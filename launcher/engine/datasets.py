"""Validates the data sets of a job, which the class of the section `data` provides, before samples are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import isroutine
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from launcher.errors import DataError


@dataclass(frozen=True)
class Data:
    """The validated data sets of a job.

    Attributes:
        train: the training data set.
        val, test: the validation and test data sets by name; the name of a single set is "".
        collate: function that makes a batch of a list of samples, or None for PyTorch's `default_collate`.
        num_workers: number of loader processes.
        source: the object of the section `data`.
        augment: `augment(batch, seeds)`, applied to training batches on the device.
        weights: float64 (N,), the sampling weight of each training sample.
    """

    train: Any
    val: dict[str, Any]
    test: dict[str, Any]
    collate: Callable[[Any], Any] | None
    num_workers: int
    source: Any = None
    augment: Callable[[Any, torch.Tensor], Any] | None = None
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, source: Any) -> Data:
        """Read and validate the attributes of the object of the section `data`.

        Raises:
            DataError: an attribute is missing, or a set has no length or no samples.
        """
        name = type(source).__name__
        if getattr(source, "train", None) is None:
            loads = hasattr(source, "train_dataloader")
            hint = " launch does not use `train_dataloader`: provide its data set as `train`." if loads else ""
            raise DataError(
                f"The data {name} has no attribute `train`; it must have the data sets `train` and `val`.{hint}"
            )
        data = cls(
            source.train,
            _named(getattr(source, "val", None)),
            _named(getattr(source, "test", None)),
            getattr(source, "collate", None),
            _loader_processes(getattr(source, "num_workers", None), name),
            source,
            getattr(source, "augment", None),
        )
        if data.collate is not None and not callable(data.collate):
            raise DataError(f"{name}.collate is {data.collate!r}; it must be a function: list of samples -> batch.")
        if data.augment is not None and not callable(data.augment):
            raise DataError(
                f"{name}.augment is {data.augment!r}; it must be a method or module: (batch, seeds) -> batch."
            )
        _check(data.train, f"{name}.train")
        for where, sets in (("val", data.val), ("test", data.test)):
            for one, dataset in sets.items():
                _check(dataset, f"{name}.{one or where}")
        return replace(data, weights=_weights(getattr(source, "weights", None), len(data.train), name))


def _weights(value: Any, length: int, name: str) -> torch.Tensor | None:
    """Return the `weights` of the data as float64 (N,), or None if it has none."""
    if value is None:
        return None
    try:
        weights = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        weights = torch.empty(0, 0)
    if weights.shape != (length,) or not bool((weights >= 0).all() & weights.isfinite().all() & (weights.sum() > 0)):
        shape = tuple(weights.shape)
        found = f"the shape {shape}" if shape != (length,) else "a negative or non-finite number, or only zeros"
        raise DataError(
            f"{name}.weights must have one number, at least 0, for each of the {length} training samples, which are "
            f"drawn in proportion to it; found {found}."
        )
    return weights


def lengths_of(dataset: Any, name: str = "data") -> torch.Tensor | None:
    """Return the `lengths` of a data set as int64 (N,), or None if it has none.

    Raises:
        DataError: they are not one integer per sample.
    """
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        return None
    try:
        numbers = torch.from_numpy(np.array(lengths))
    except (TypeError, ValueError):
        numbers = torch.empty(0, 0)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.shape != (len(dataset),):
        found = f"{str(numbers.dtype).removeprefix('torch.')} {tuple(numbers.shape)}" if numbers.ndim != 2 else "none"
        raise DataError(
            f"`lengths` of the data set {name} must have one integer for each of its {len(dataset)} samples; "
            f"found {found}."
        )
    return numbers.long()


def blocks_of(dataset: Any, name: str = "data") -> torch.Tensor | None:
    """Return the `blocks` of a data set as int64, or None if it has none.

    Raises:
        DataError: they are not integers whose sum is the length of the data set.
    """
    blocks = getattr(dataset, "blocks", None)
    if blocks is None:
        return None
    numbers = torch.as_tensor(blocks)
    if numbers.is_floating_point() or numbers.ndim != 1 or int(numbers.sum()) != len(dataset) or (numbers < 0).any():
        raise DataError(
            f"`blocks` of the data set {name} must be integers with the sum {len(dataset)}, the number of its samples; "
            f"found the sum {int(numbers.sum())}."
        )
    return numbers.long()


def _loader_processes(value: Any, name: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0:
        raise DataError(
            f"{name}.num_workers is {value!r}; it must be the number of loader processes, an integer of at least 0."
        )
    return int(value)


def _named(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"": value}


_MAP_STYLE = "provide a map-style data set with __len__ and __getitem__, so that every sample can be used exactly once"


def _check(dataset: Any, name: str) -> None:
    """Raise DataError if `dataset` cannot be read by index; the message names a remedy."""
    if (remedy := _remedy(dataset, name)) is not None:
        raise DataError(f"The data set {name} is a {type(dataset).__name__}; {remedy}")
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"The data set {name} is a {type(dataset).__name__} without a length; {_MAP_STYLE}.") from error
    if length == 0:
        raise DataError(f"The data set {name} has 0 samples. Check the path and the split in its configuration.")
    lengths_of(dataset, name)
    blocks_of(dataset, name)


def _remedy(dataset: Any, name: str) -> str | None:
    """Return the remedy for an object that is not a map-style data set, or None for one that is."""
    if isinstance(dataset, DataLoader):
        return (
            "provide its data set instead. Its arguments are replaced by trainer.global_batch_size, trainer.seed, and "
            "`collate` and `num_workers` of the data."
        )
    iterates = isinstance(dataset, IterableDataset) and type(dataset).__getitem__ is IterableDataset.__getitem__
    if iterates or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        return (
            f"{_MAP_STYLE}. To train on a stream, add a method `stream(rank, world_size, seed, apply)` to it "
            "(docs/extending.md)."
        )
    if isinstance(dataset, type) or isroutine(dataset):
        return "call it, so that the attribute is the data set itself."
    if isinstance(dataset, Mapping) and not all(isinstance(key, int) for key in dataset):
        return "only `val` and `test` may be mappings. Join its data sets with torch.utils.data.ConcatDataset."
    if isinstance(dataset, (str, bytes)):
        return "paths are not read. Provide a data set that reads the files."
    if isinstance(dataset, (list, tuple)) and any(isinstance(item, (Dataset, DataLoader)) for item in dataset):
        if name.rpartition(".")[2] == "train":
            return "join its data sets with torch.utils.data.ConcatDataset."
        return "provide several sets as a mapping {name: data set}; the names become part of the tags."
    if isinstance(dataset, tuple) and dataset and all(isinstance(item, (torch.Tensor, np.ndarray)) for item in dataset):
        return "each of its tensors would be one sample. Use torch.utils.data.TensorDataset(x, y)."
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return f"{_MAP_STYLE}."
    return None
