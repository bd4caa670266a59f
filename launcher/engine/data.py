"""How the samples of a job are read: a microbatch at a time, ahead of the trainer, onto the device.

Which samples those are is said in `order.py`, and of which data sets in `datasets.py`.
"""

from __future__ import annotations

import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from launcher.engine.batches import move, record_stream
from launcher.engine.failures import traceback_of_user
from launcher.engine.order import mix, mix_each
from launcher.engine.randomness import own_randomness
from launcher.errors import DataError, UserCodeError


@dataclass(frozen=True)
class Failure:
    """An exception of a loader process, carried to the trainer as a value so that its message stays as it was."""

    is_data: bool
    message: str
    traceback_text: str

    def raise_it(self) -> None:
        if self.is_data:
            raise DataError(self.message)
        raise UserCodeError(self.message, self.traceback_text)


class Fetch:
    """Reads one microbatch: `fetch[(epoch, indices)]` is the collated batch, or a Failure.

    In-memory data is gathered in one indexing operation; otherwise samples are read one by one, each behind the seed of
    (seed, epoch, index), so that random augmentation does not depend on who reads the sample.

    Args:
        augment: `augment(batch, seeds)`, which the loader calls on the device; then `fetch[…]` is (batch, seeds), with
            one number per sample, int64 (B,).
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any] | None,
        seed: int,
        augment: Callable[[Any, torch.Tensor], Any] | None = None,
    ) -> None:
        self.augment = augment
        self._dataset = dataset
        self._collate = collate
        self._seed = seed
        self._gather = _gather_of(dataset)
        self._gather_takes_seeds = self._gather is not None and "seeds" in signature(self._gather).parameters

    @property
    def in_memory(self) -> bool:
        """Whether batches are gathered from tensors; worker processes would only copy them."""
        return isinstance(self._dataset, TensorDataset)

    def __getitem__(self, key: tuple[int, torch.Tensor]) -> Any:
        epoch, indices = key
        try:
            batch = self._fetch(epoch, indices)
            if self.augment is None:
                return batch
            return batch, mix_each(self._seed, epoch, last=indices)
        except (ValueError, OSError) as error:
            return Failure(True, str(error), traceback_of_user(error))
        except Exception as error:
            return Failure(False, f"{type(error).__name__}: {error}", traceback_of_user(error))

    def _fetch(self, epoch: int, indices: torch.Tensor) -> Any:
        if isinstance(self._dataset, TensorDataset):
            batch: Any = tuple(tensor[indices] for tensor in self._dataset.tensors)
            return self._collate(batch) if self._collate else batch
        chosen = indices.tolist()
        if self._gather is not None:
            if self._gather_takes_seeds:
                batch = self._gather(chosen, seeds=mix_each(self._seed, epoch, last=indices).tolist())
            else:
                batch = self._gather(chosen)
            if self._collate:
                return self._collate(batch)
            return default_collate(batch) if isinstance(batch, list) else batch
        with own_randomness():
            samples = [self._sample(epoch, index) for index in chosen]
        return (self._collate or default_collate)(samples)

    def _sample(self, epoch: int, index: int) -> Any:
        seed = mix(self._seed, epoch, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        return self._dataset[index]


def _gather_of(dataset: Any) -> Callable[..., Any] | None:
    """Return the data set's `__getitems__`, where it is its own: a Subset has one that may only loop over samples."""
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    return getattr(dataset, "__getitems__", None) if hasattr(inner, "__getitems__") else None


def _identity(value: Any) -> Any:
    return value


class Loader:
    """Reads microbatches ahead of the trainer and puts them on the device.

    The keys of what comes next are a guess (`keys`), which holds until the number of workers or the position changes;
    then the trainer opens another iterator and what was read ahead is dropped.

    Args:
        num_workers: loader processes; 0 reads in this process. In-memory data is always read in this process.

    Attributes:
        transforming: seconds so far that went into what is done on the device; no waiting for data.
    """

    def __init__(
        self, fetch: Fetch, device: torch.device, num_workers: int = 0, convert: Callable[[Any], Any] = _identity
    ) -> None:
        self._fetch = fetch
        self._device = device
        self._num_workers = 0 if fetch.in_memory else num_workers
        self._convert = convert
        self.transforming = 0.0

    def read(self, keys: Iterator[tuple[int, torch.Tensor]], at: int = 0) -> Generator[Any]:
        """Yield the batch of each key, on the device. `at`: the step that the first one is for.

        Raises:
            DataError: a sample is bad; the message is the data set's own.
            UserCodeError: the data set raised anything else.
        """
        with closing(self._batches(keys)) as batches:
            if self._device.type == "cuda":
                yield from self._ahead(batches)
            else:
                for batch in batches:
                    yield self._finish(self._checked(batch))

    def _batches(self, keys: Iterator[tuple[int, torch.Tensor]]) -> Generator[Any]:
        if not self._num_workers:
            yield from (self._fetch[key] for key in keys)
            return
        batches = iter(
            DataLoader(
                self._fetch,  # type: ignore[arg-type]
                batch_size=None,
                sampler=_Keys(keys),
                num_workers=self._num_workers,
                collate_fn=_identity,
                pin_memory=self._device.type == "cuda",
                multiprocessing_context="fork" if self._device.type == "cpu" else "forkserver",
                # It draws a seed for its processes, which must not come from the trainer's random numbers.
                generator=torch.Generator(),
                worker_init_fn=_leave_signals_to_the_trainer,
            )
        )
        try:
            if self._device.type == "cuda":  # pinning has such a thread
                yield from batches
            else:
                yield from in_background(batches)
        finally:
            del batches  # ends the processes, even where a traceback keeps this frame

    def once(self, epoch: int, indices: torch.Tensor) -> Iterator[Any]:
        """Read one batch in this process, whatever `num_workers` says."""
        batch = self._checked(self._fetch[epoch, indices])
        yield self._finish(move(batch, self._device))

    def _finish(self, batch: Any) -> Any:
        """What is done on the device: the data's own augmentation, and what the model asks of every batch."""
        began = time.perf_counter()
        if self._fetch.augment is not None:
            try:
                with torch.no_grad():
                    batch = self._fetch.augment(*batch)
            except Exception as error:
                raise UserCodeError(f"{type(error).__name__}: {error}", traceback_of_user(error)) from error
        batch = self._convert(batch)
        self.transforming += time.perf_counter() - began
        return batch

    @staticmethod
    def _checked(batch: Any) -> Any:
        if isinstance(batch, Failure):
            batch.raise_it()
        return batch

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Copy the next batch on a side stream while the device computes on the current one."""
        stream = torch.cuda.Stream(self._device)

        def copy(batch: Any) -> Any:
            with torch.cuda.stream(stream):
                return self._finish(move(self._checked(batch), self._device))

        sentinel = object()
        following = next(batches, sentinel)
        ready = copy(following) if following is not sentinel else sentinel
        while ready is not sentinel:
            current = ready
            torch.cuda.current_stream(self._device).wait_stream(stream)
            # The allocator must not hand this memory to the side stream while the current stream still reads it.
            record_stream(current, torch.cuda.current_stream(self._device))
            following = next(batches, sentinel)
            ready = copy(following) if following is not sentinel else sentinel
            yield current


def in_background(items: Iterator[Any], patience: float = 5.0) -> Generator[Any]:
    """Yield the items, of which a thread fetches the next one while the caller works on this one.

    A batch of another process is put together from handles that this process has to ask that one for; where all cores
    are busy each such question takes milliseconds.

    Args:
        patience: seconds that an early end waits for the item that is being fetched.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def fetch(items: Iterator[Any]) -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if ended.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))
        finally:
            del items  # here and below: a traceback may keep the frame, and with it the processes

    thread = threading.Thread(target=fetch, args=(items,), name="launch-read-ahead", daemon=True)
    thread.start()
    del items
    try:
        while True:
            what, value = ready.get()
            if what == "error":
                raise value
            if what == "end":
                return
            yield value
            del value  # the memory of a batch is not kept while another is waited for
    finally:
        ended.set()
        with suppress(queue.Empty):
            while True:
                ready.get_nowait()  # makes room for what is fetched now
        thread.join(patience)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the trainer stops after its step, for which it needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Keys:
    """A sampler over an iterator of keys: DataLoader asks a sampler for an iterator once."""

    def __init__(self, keys: Iterator[tuple[int, torch.Tensor]]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        return self._keys
