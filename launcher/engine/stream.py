"""Reads training data as a stream, instead of sample by sample in the engine's order.

A data set with a method `stream` also has a length and supports indexing, so that batch arithmetic, the start check and
validation work as for other data sets. The guarantees are weaker, as docs/exactness.md describes: the samples of a
batch depend on the number of workers and on restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count
from typing import Any

import torch

from launcher.engine.batches import cut, join, rows
from launcher.engine.data import Loader
from launcher.engine.failures import traceback_of_user
from launcher.engine.fetch import Fetch
from launcher.engine.order import Key, mix, mix_each
from launcher.engine.randomness import preserve_random_states, seed_for_reading
from launcher.engine.runtime import Runtime
from launcher.errors import DataError, UserCodeError


class StreamLoader(Loader):
    """Reads microbatches of the requested sizes from `dataset.stream(rank, world_size, seed, apply)`.

    The stream yields pieces: batches of any size, whose tensors have one row per sample. One stream is one pass over
    this rank's part; when it ends, another one is opened, so that a rank with a small part repeats some samples.

    The global generators are seeded before each piece with (seed, step at which the stream was opened, rank, number).
    """

    def __init__(
        self, dataset: Any, runtime: Runtime, seed: int, *, fetch: Fetch, convert: Callable[[Any], Any]
    ) -> None:
        super().__init__(fetch, runtime.device, 0, convert)
        self._dataset, self._runtime, self._base = dataset, runtime, seed

    def read(self, keys: Iterator[Key], at: int = 0) -> Generator[Any]:
        # The seed of the pass depends on the step, so that a resumed run does not read the same samples again.
        with closing(self._seeded(self._pieces(mix(self._base, at)), at)) as pieces:
            rest: Any = None
            for number, key in enumerate(keys):
                batch, rest = self._cut(rest, pieces, len(key.indices))
                if self._fetch.augment is not None:
                    place = (self._base, at, self._runtime.rank, number)
                    batch = batch, mix_each(*place, last=torch.arange(len(key.indices)))
                yield self._placed(batch)

    def _cut(self, rest: Any, pieces: Iterator[Any], size: int) -> tuple[Any, Any]:
        """Return a batch of `size` samples, and the rest of the last piece."""
        parts, found = ([rest], rows(rest)) if rest is not None else ([], 0)
        while found < size:
            piece = next(pieces)
            parts.append(piece)
            found += rows(piece)
        whole = parts[0] if len(parts) == 1 else join(parts)
        return cut(whole, 0, size), cut(whole, size) if found > size else None

    def _seeded(self, pieces: Generator[Any], at: int) -> Generator[Any]:
        with closing(pieces):
            for number in count():
                with preserve_random_states():
                    seed_for_reading(mix(self._base, at, self._runtime.rank, number))
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece

    def _pieces(self, start: int) -> Generator[Any]:
        rank, world_size, apply = self._runtime.rank, self._runtime.world_size, self._runtime.apply
        number = 0
        while True:
            empty = True
            try:
                for piece in self._dataset.stream(rank, world_size, mix(start, number), apply):
                    empty = empty and not rows(piece)
                    yield piece
            except (ValueError, OSError) as error:  # may come from another process, through `apply`
                raise DataError(str(error)) from error
            except Exception as error:
                raise UserCodeError(f"{type(error).__name__}: {error}", traceback_of_user(error)) from error
            if empty:
                raise DataError(
                    f"The stream of {type(self._dataset).__name__} has no samples for rank {rank}. Use fewer workers."
                )
            number += 1
