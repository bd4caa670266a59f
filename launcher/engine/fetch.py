"""Reads one microbatch: its samples, the seeds of their random numbers, and the collated batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate, get_worker_info

from launcher.config.calling_directory import Entrance
from launcher.engine.failures import is_raised_by_user, traceback_of_user
from launcher.engine.mismatched_sample import find_mismatched_sample
from launcher.engine.order import Key, mix, mix_each
from launcher.engine.randomness import preserve_random_states, seed_for_reading
from launcher.errors import DataError, UserCodeError

_BATCH = 1  # distinguishes the seed of a batch from that of its first sample


@dataclass(frozen=True)
class ReadFailure:
    """An exception of a loader process as a value, which DataLoader passes to the trainer with its message "
    "unchanged."""

    is_data: bool
    message: str
    traceback_text: str

    def raise_it(self) -> None:
        if self.is_data:
            raise DataError(self.message)
        raise UserCodeError(self.message, self.traceback_text)


class Fetch:
    """Reads one microbatch: `fetch[key]` is the collated batch, or a ReadFailure.

    In-memory data is gathered in one indexing operation. For other data, the global generators of torch, random and
    NumPy are seeded before each sample with (seed, epoch, position), and before each batch (`__getitems__`, `collate`)
    with (seed, epoch, first position). Random augmentation therefore depends neither on the reading process nor on the
    samples that it read before. The generators of the caller are preserved.

    Args:
        augment: `augment(batch, seeds)`, called by the loader on the device. With it, `fetch[key]` is (batch, seeds)
            with one seed per sample, int64 (B,).
        name: name of the data set in messages.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any] | None,
        seed: int,
        augment: Callable[[Any, torch.Tensor], Any] | None = None,
        name: str = "",
    ) -> None:
        self.augment = augment
        self.seed = seed
        self._dataset = dataset
        self._name = name or type(dataset).__name__
        self._collate = collate
        self._tensors = _tensors_of(dataset)
        self._gather = _gather_of(dataset)
        self._gather_takes_seeds = self._gather is not None and "seeds" in signature(self._gather).parameters

    def __getstate__(self) -> dict[str, Any]:
        # First: to unpickle the data set, a loader process that is not forked must import the data set's module.
        return {"_entrance": Entrance(), **self.__dict__}

    @property
    def in_memory(self) -> bool:
        """Whether batches are gathered from tensors in memory, so that loader processes would only copy them."""
        return self._tensors is not None and self._collate is None

    def seeds(self, key: Key) -> torch.Tensor:
        """Return the seed of each sample of the key, int64 (B,)."""
        return mix_each(self.seed, key.epoch, last=torch.arange(key.first, key.first + len(key.indices)))

    def __getitem__(self, key: Key) -> Any:
        try:
            if self._tensors is not None and self._collate is None:
                batch: Any = tuple(tensor[key.indices] for tensor in self._tensors)
            else:
                # In a loader process nothing else uses the random states.
                with preserve_random_states() if get_worker_info() is None else nullcontext():
                    batch = self._batch(key)
        except _Failed as failed:
            return failed.failure
        except Exception as error:
            return _failure(error)
        return batch if self.augment is None else (batch, self.seeds(key))

    def _batch(self, key: Key) -> Any:
        samples = self._samples(key)
        if not isinstance(samples, list) and self._collate is None:
            return samples  # `__getitems__` returned a batch
        if self._gather is None:
            self._seed_batch(key)
        try:
            return (self._collate or default_collate)(samples)
        except Exception as error:
            given = samples if isinstance(samples, list) and samples else [()]
            odd = find_mismatched_sample(given, key.indices.tolist(), self._name, shapes=self._collate is None)
            if odd is None or self._collate is not None:
                raise _Failed(_failure(error, odd)) from error
            remedy = (
                "Return samples of the same form, or add a `collate` to the data that makes a batch of such samples."
            )
            raise _Failed(ReadFailure(True, f"{odd} {remedy}", traceback_of_user(error))) from error

    def _samples(self, key: Key) -> Any:
        """Return the samples of the key as a list, or the result of `__getitems__`."""
        if self._tensors is not None:
            return list(zip(*(tensor[key.indices].unbind() for tensor in self._tensors), strict=True))
        indices = key.indices.tolist()
        if self._gather is not None:
            self._seed_batch(key)
            if self._gather_takes_seeds:
                return self._gather(indices, seeds=self.seeds(key).tolist())
            return self._gather(indices)
        return [self._sample(index, seed) for index, seed in zip(indices, self.seeds(key).tolist(), strict=True)]

    def _sample(self, index: int, seed: int) -> Any:
        seed_for_reading(seed)
        try:
            return self._dataset[index]
        except Exception as error:
            raise _Failed(_failure(error, f"It was raised for sample {index} of {self._name}.")) from error

    def _seed_batch(self, key: Key) -> None:
        seed_for_reading(mix(self.seed, key.epoch, key.first, _BATCH))


class _Failed(Exception):
    def __init__(self, failure: ReadFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _failure(error: Exception, remark: str | None = None) -> ReadFailure:
    """Return the error as a value. An OSError, or a ValueError raised by the data set, is an error of the data.

    Args:
        remark: a sentence that is appended to the message of other errors.
    """
    if isinstance(error, OSError) or (isinstance(error, ValueError) and is_raised_by_user(error)):
        return ReadFailure(True, str(error), traceback_of_user(error))
    message, text = f"{type(error).__name__}: {error}", traceback_of_user(error)
    if remark:
        message, text = f"{message} ({remark})", f"{text}{remark}\n"
    return ReadFailure(False, message, text)


def _tensors_of(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors of a TensorDataset, or None for other data sets and for subclasses that override indexing."""
    if not isinstance(dataset, TensorDataset) or hasattr(dataset, "__getitems__"):
        return None
    return dataset.tensors if type(dataset).__getitem__ is TensorDataset.__getitem__ else None


def _gather_of(dataset: Any) -> Callable[..., Any] | None:
    """Return the data set's own `__getitems__`, or None. The one of `Subset` may only loop over samples."""
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    return getattr(dataset, "__getitems__", None) if hasattr(inner, "__getitems__") else None
