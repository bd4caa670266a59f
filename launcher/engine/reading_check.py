"""Checks the reading of data at the start: ignored attributes, pickling, and reproducible random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from launcher.engine.batches import leaves
from launcher.engine.datasets import Data
from launcher.engine.fetch import Fetch, ReadFailure
from launcher.engine.order import Key
from launcher.errors import DataError

_SAMPLES = 2

# Attributes that PyTorch's DataLoader, or Lightning's data module, would use -> the equivalent in launch.
_OF_DATA = {
    "batch_size": "trainer.global_batch_size",
    "shuffle": "trainer.shuffle",
    "drop_last": "trainer.drop_last",
    "sampler": "trainer.shuffle, and `weights` of the data (one number a sample)",
    "batch_sampler": "trainer.global_batch_size, and `lengths` of a data set for batches of similar length",
    "collate_fn": "`collate`",
    "generator": "trainer.seed",
    "worker_init_fn": "the seeds that launch sets before each sample",
    "pin_memory": "pinned memory, which launch always uses with a GPU",
    "persistent_workers": "loader processes that always persist during the run",
    "prefetch_factor": "`num_workers`",
    "multiprocessing_context": "`num_workers`",
    "train_dataloader": "`train`",
    "val_dataloader": "`val`",
    "test_dataloader": "`test`",
    "predict_dataloader": "`inputs(path)`",
    "prepare_data": "the constructor",
    "setup": "the constructor",
    "transfer_batch_to_device": "a method to(device) of the batch",
    "on_before_batch_transfer": "`collate`",
    "on_after_batch_transfer": "`augment(batch, seeds)`",
}
_OF_SETS = {
    "collate_fn": "`collate` of the data",
    "collate": "`collate` of the data",
    "sampler": _OF_DATA["sampler"],
    "batch_sampler": _OF_DATA["batch_sampler"],
}


def notes_on_reading(data: Data, seed: int) -> list[str]:
    """Return the notes about reading the data, one line each.

    Raises:
        DataError: a batch cannot be sent from a loader process, or a sample is damaged.
        UserCodeError: the data set raised another exception.
    """
    return [*_ignored(data), *_other_generators(data, seed)]


def _ignored(data: Data) -> list[str]:
    found = {f"`{name}`": instead for name, instead in _OF_DATA.items() if _has(data.source, name)}
    for where, dataset in _sets(data):
        for name, instead in _OF_SETS.items():
            if _has(dataset, name) and not ("collate" in name and data.collate is not None):
                found[f"`{where}.{name}`"] = instead
    if not found:
        return []
    parts = "; ".join(f"{name} is replaced by {instead}" for name, instead in found.items())
    return [f"Attributes of the data {type(data.source).__name__} have no effect: {parts}."]


def _sets(data: Data) -> Iterator[tuple[str, Any]]:
    yield "train", data.train
    for name, dataset in data.val.items():
        yield f"val/{name}".rstrip("/"), dataset


def _has(owner: Any, name: str) -> bool:
    try:
        return getattr(owner, name, None) is not None
    except Exception:  # a property may fail
        return False


def _other_generators(data: Data, seed: int) -> list[str]:
    """Read the first samples twice. Samples that use the global generators only are equal both times."""
    differing = []
    for where, dataset in _sets(data):
        fetch = Fetch(dataset, data.collate, seed, name=where)
        if fetch.in_memory:
            continue
        key = Key(0, 0, torch.arange(min(_SAMPLES, len(dataset))))
        first, second = fetch[key], fetch[key]
        for batch in (first, second):
            if isinstance(batch, ReadFailure):
                batch.raise_it()
        if data.num_workers:
            _require_picklable(first, where)
        if not _same(first, second):
            differing.append(where)
    if not differing:
        return []
    return [
        f"Samples of {', '.join(differing)} differ when they are read twice with the same seed, so runs are not "
        "reproducible. The data set may use its own random generator, or a counter. Use the global generators of "
        "torch, random or numpy, which are seeded for each sample."
    ]


def _require_picklable(batch: Any, where: str) -> None:
    try:
        ForkingPickler.dumps(batch)
    except Exception as error:
        raise DataError(
            f"A batch of {where} cannot be sent from a loader process: {type(error).__name__}: {error}. Remove "
            "objects that cannot be pickled (and tensors that require gradients), or use data.num_workers=0."
        ) from error


def _same(one: Any, other: Any) -> bool:
    """Whether two batches have equal values, as far as their types can be compared."""
    pairs = zip(_values(one), _values(other), strict=False)
    return len(_values(one)) == len(_values(other)) and all(_equal(a, b) for a, b in pairs)


def _values(batch: Any) -> list[Any]:
    return leaves(batch, lambda value: isinstance(value, (np.ndarray, np.generic, str, bytes, int, float)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (str, bytes)):
        return bool(one == other)
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    except Exception:  # arrays of objects, and tensors without comparison
        return True
    return True
