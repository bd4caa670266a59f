"""What a job's data are: the data sets that the configuration's `data` gives, checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from launcher.errors import DataError


@dataclass(frozen=True)
class Data:
    """The data sets of a job, checked: `train`, validation sets by name ("" when there is just one), `test` alike.

    `source` is the object that the configuration's `data` names.
    """

    train: Any
    val: dict[str, Any]
    test: dict[str, Any]
    collate: Callable[[Any], Any] | None
    num_workers: int
    source: Any = None
    augment: Callable[[Any, torch.Tensor], Any] | None = None  # of training batches, on the device

    @classmethod
    def of(cls, source: Any) -> Data:
        """Take the attributes of the object that the configuration's `data` names.

        Raises:
            DataError: an attribute is missing, or a set has no length or no samples.
        """
        name = type(source).__name__
        if getattr(source, "train", None) is None:
            raise DataError(f"The data {name} has no attribute `train`; it must give `train` and `val` data sets.")
        data = cls(
            source.train,
            _named(getattr(source, "val", None)),
            _named(getattr(source, "test", None)),
            getattr(source, "collate", None),
            int(getattr(source, "num_workers", 0) or 0),
            source,
            getattr(source, "augment", None),
        )
        if data.augment is not None and not callable(data.augment):
            raise DataError(
                f"{name}.augment is {data.augment!r}; it must be a method or module: (batch, seeds) -> batch."
            )
        for where, dataset in (("train", data.train), *data.val.items(), *data.test.items()):
            _check(dataset, f"{name}.{where or 'val'}")
        return data


def lengths_of(dataset: Any, name: str = "data") -> torch.Tensor | None:
    """Return the `lengths` of a data set as int64 (N,), or None where it has none.

    Raises:
        DataError: they are not one whole number for each sample.
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
            f"The data set {name} has `lengths` that are not one whole number for each of its {len(dataset)} samples; "
            f"found {found}."
        )
    return numbers.long()


def blocks_of(dataset: Any, name: str = "data") -> torch.Tensor | None:
    """Return the `blocks` of a data set as int64, or None where it has none.

    Raises:
        DataError: they are not whole numbers that add up to the data set's length.
    """
    blocks = getattr(dataset, "blocks", None)
    if blocks is None:
        return None
    numbers = torch.as_tensor(blocks)
    if numbers.is_floating_point() or numbers.ndim != 1 or int(numbers.sum()) != len(dataset) or (numbers < 0).any():
        raise DataError(
            f"The data set {name} has `blocks` that are not the sizes of its parts: {int(numbers.sum())} samples "
            f"in all instead of {len(dataset)}."
        )
    return numbers.long()


def _named(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _check(dataset: Any, name: str) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"The data set {name} is a {type(dataset).__name__}; a map-style data set with __len__ and __getitem__ is "
            "needed, so that every sample can be used exactly once."
        )
    if len(dataset) == 0:
        raise DataError(f"The data set {name} is empty. Check the path and the split that its configuration names.")
    lengths_of(dataset, name)
    blocks_of(dataset, name)
