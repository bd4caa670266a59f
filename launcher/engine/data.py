"""Reads the microbatches of a job ahead of the trainer and copies them to the device.

`order.py` selects the samples, `datasets.py` validates the data sets, and `fetch.py` collates the batches.
"""

from __future__ import annotations

import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from itertools import chain
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader

from launcher.engine.batches import move, pin
from launcher.engine.failures import LoaderDied, traceback_of_user
from launcher.engine.fetch import Fetch, ReadFailure
from launcher.engine.order import Key, mix
from launcher.engine.randomness import preserve_random_states, seed_for_reading
from launcher.errors import DataError, UserCodeError


def _identity(value: Any) -> Any:
    return value


class Loader:
    """Reads microbatches ahead of the trainer and copies them to the device.

    The `keys` that are read ahead stay valid until the number of workers or the position changes. The trainer then
    opens another iterator, and the batches that were read ahead are dropped.

    Args:
        num_workers: number of loader processes; 0 reads in this process. In-memory data is always read in this process.
        convert: applied to every batch on the device.

    Attributes:
        transforming: total seconds of augmentation and conversion on the device, which is not time waiting for data.
    """

    def __init__(
        self, fetch: Fetch, device: torch.device, num_workers: int = 0, convert: Callable[[Any], Any] = _identity
    ) -> None:
        self._fetch = fetch
        self._device = device
        self._num_workers = 0 if fetch.in_memory else num_workers
        self._convert = convert
        self.transforming = 0.0

    def read(self, keys: Iterator[Key], at: int = 0) -> Generator[Any]:
        """Yield the batch of each key, on the device.

        Args:
            at: the step that the first key belongs to.

        Raises:
            DataError: a sample is damaged, or cannot be collated.
            UserCodeError: the data set raised another exception.
            LoaderDied: a loader process died.
        """
        with closing(self._batches(keys)) as batches:
            if self._device.type == "cuda":
                yield from self._ahead(batches)
            else:
                for batch in batches:
                    yield self._placed(batch)

    def _batches(self, keys: Iterator[Key]) -> Generator[Any]:
        first = next(keys, None)
        if first is None:
            return
        keys = chain([first], keys)
        if not self._num_workers:
            yield from (self._fetch[key] for key in keys)
            return
        loader: DataLoader[Any] = DataLoader(
            self._fetch,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Keys(keys),
            num_workers=self._num_workers,
            collate_fn=_identity,
            multiprocessing_context="fork" if self._device.type == "cpu" else "forkserver",
            # DataLoader draws a seed for its processes, which must not advance the trainer's random state. The seed
            # differs between ranks, runs and positions in the run.
            generator=torch.Generator().manual_seed(mix(self._fetch.seed, first.epoch, first.first)),
            worker_init_fn=_ignore_signals,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            batches = iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise DataError(
                f"The data set cannot be sent to loader processes: {error}. Make it picklable, or use "
                "data.num_workers=0."
            ) from error
        if handler is not None and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises in the main thread when a loader process dies, possibly inside a collective.
            # Without it, waiting for the next batch raises within five seconds.
            signal.signal(signal.SIGCHLD, handler)
        processes = list(getattr(batches, "_workers", ()))
        try:
            yield from in_background(map(self._pinned, batches))
        except (RuntimeError, EOFError, OSError) as error:  # a dead process does not send its remaining batches
            wait([process.sentinel for process in processes], timeout=1)
            ended = [process.exitcode for process in processes if process.exitcode is not None]
            if not ended:
                raise
            raise LoaderDied(next((status for status in ended if status), 0)) from error
        finally:
            del batches  # ends the processes even if a traceback keeps this frame alive

    def _pinned(self, batch: Any) -> Any:
        """Pin a batch for the copy to the GPU. Runs in another thread, whose current device is the first GPU."""
        if self._device.type != "cuda":
            return batch
        torch.cuda.set_device(self._device)
        return pin(batch)

    def once(self, epoch: int, indices: torch.Tensor, first: int = 0) -> Iterator[Any]:
        """Read one batch in this process, regardless of `num_workers`."""
        yield self._placed(self._fetch[Key(epoch, first, indices)])

    def _placed(self, batch: Any) -> Any:
        """Return the batch on the device, after the augmentation of the data and the conversion for the model."""
        if isinstance(batch, ReadFailure):
            batch.raise_it()
        augment = self._fetch.augment
        seed = 0 if augment is None else int(batch[1][0])  # read on the host: no synchronization
        if self._device.type != "cpu":
            batch = move(batch, self._device)
        began = time.perf_counter()
        if augment is not None:
            try:
                with torch.no_grad(), preserve_random_states(self._device):
                    seed_for_reading(seed)
                    batch = augment(*batch)
            except Exception as error:
                raise UserCodeError(f"{type(error).__name__}: {error}", traceback_of_user(error)) from error
        batch = self._convert(batch)
        self.transforming += time.perf_counter() - began
        return batch

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Copy the next batch on a side stream while the device computes on the current batch.

        The side stream starts a copy after the steps that were queued before it, so they no longer read memory that the
        side stream frees and reuses.
        """
        stream, sentinel = torch.cuda.Stream(self._device), object()

        def copied() -> Any:
            batch = next(batches, sentinel)
            if batch is sentinel:
                return sentinel
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                return self._placed(batch)

        ready = copied()
        while ready is not sentinel:
            current = ready
            torch.cuda.current_stream(self._device).wait_stream(stream)
            ready = copied()
            yield current


def in_background(items: Iterator[Any], patience: float = 5.0) -> Generator[Any]:
    """Yield the items; a thread fetches the next item while the caller processes the current one.

    A batch of a loader process is rebuilt from handles that this process requests from it. On a busy machine each
    request takes milliseconds.

    Args:
        patience: seconds to wait for the current fetch when the generator is closed early.
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
            del items  # also below: a traceback may keep the frame alive, and with it the loader processes

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
            del value  # free the batch before waiting for the next one
    finally:
        ended.set()
        with suppress(queue.Empty):
            while True:
                ready.get_nowait()  # unblocks the thread
        thread.join(patience)


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes: the trainer needs its batches to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Keys:
    """A sampler over an iterator of keys, for DataLoader, which requests the iterator once."""

    def __init__(self, keys: Iterator[Key]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Key]:
        return self._keys
