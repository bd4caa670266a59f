"""Iterates over this rank's part of each global batch."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from launcher.engine.data import Loader
from launcher.engine.order import Order, Split, keys_of_training
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.engine.throughput import Throughput


@dataclass
class GlobalBatch:
    """One global batch.

    Attributes:
        size: number of samples over all ranks.
        microbatches: this rank's microbatches, on the device; can be iterated once.
    """

    size: int
    microbatches: Iterator[Any]


class GlobalBatches:
    """Iterates over the global batches from the run's position to its end.

    The share of a rank is computed at the beginning of each step, from the current rank and world size. `progress` must
    advance between two global batches.

    Args:
        throughput: receives the time in which the device waits for data.
    """

    def __init__(
        self,
        order: Order,
        split: Split,
        loader: Loader,
        runtime: Runtime,
        progress: Progress,
        throughput: Throughput,
        total_steps: int,
    ) -> None:
        self._order, self._split, self._loader, self._runtime = order, split, loader, runtime
        self._progress, self._throughput, self._total_steps = progress, throughput, total_steps
        self._reading: Generator[Any] | None = None
        self._facts = (runtime.rank, runtime.world_size)

    @property
    def passes(self) -> int:
        """The largest number of microbatches of a worker in one step."""
        n = self._runtime.world_size
        return max(len(self._split.share(self._order.batch_size(0), rank, n)) for rank in range(n))

    def first(self) -> Any:
        """Return rank 0's first microbatch of the first global batch, on every rank."""
        (start, stop), *_ = self._split.share(self._order.batch_size(0), 0, self._runtime.world_size)
        return next(self._loader.once(0, self._order.epoch(0)[start:stop], start))

    def __iter__(self) -> Iterator[GlobalBatch]:
        while self._progress.step < self._total_steps:
            facts = (self._runtime.rank, self._runtime.world_size)
            if self._reading is None or facts != self._facts:
                self.close()
                self._reading, self._facts = self._timed(self._read()), facts
            size = self._order.batch_size(self._progress.batch)
            yield GlobalBatch(size, islice(self._reading, len(self._split.share(size, *facts))))

    def again(self) -> Iterator[Any]:
        """Read this rank's microbatches of the current step again."""
        self.close()
        size = self._order.batch_size(self._progress.batch)
        share = self._split.share(size, self._runtime.rank, self._runtime.world_size)
        with closing(self._read()) as batches:
            yield from islice(batches, len(share))

    def close(self) -> None:
        """Stop reading and end the loader processes."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _read(self) -> Generator[Any]:
        p, r = self._progress, self._runtime
        keys = keys_of_training(
            self._order, self._split, r.rank, r.world_size, p.epoch, p.batch, last_step=self._total_steps, step=p.step
        )
        return self._loader.read(keys, at=p.step)

    def _timed(self, batches: Generator[Any]) -> Generator[Any]:
        loader = self._loader
        with closing(batches):
            while True:
                before, busy = time.perf_counter(), loader.transforming
                batch = next(batches, None)
                self._throughput.waited(time.perf_counter() - before - (loader.transforming - busy))
                if batch is None:
                    return
                yield batch
