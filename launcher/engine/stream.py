"""Training data that are read as a stream, instead of sample by sample in the engine's order.

A data set with a method `stream` still has a length and can be indexed, so that batch arithmetic, the start check and
validation are those of every other. What is weaker is told in docs/exactness.md: which samples make up a batch depends
on the number of workers and on restarts.
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
    """Reads microbatches of the sizes that are asked for from `dataset.stream(rank, world_size, seed, apply)`.

    That yields pieces: batches of any size, whose tensors have one row a sample. One stream is one pass over this
    rank's part; another follows when it ends, so that a rank whose part is small repeats some of it.

    The global generators are seeded before each piece with (seed, step at which the stream was opened, rank, number).
    """

    def __init__(
        self, dataset: Any, runtime: Runtime, seed: int, *, fetch: Fetch, convert: Callable[[Any], Any]
    ) -> None:
        super().__init__(fetch, runtime.device, 0, convert)
        self._dataset, self._runtime, self._base = dataset, runtime, seed

    def read(self, keys: Iterator[Key], at: int = 0) -> Generator[Any]:
        # Where the run stands decides the pass, so that a resumed run does not read the same beginning again.
        with closing(self._seeded(self._pieces(mix(self._base, at)), at)) as pieces:
            rest: Any = None
            for number, key in enumerate(keys):
                batch, rest = self._cut(rest, pieces, len(key.indices))
                if self._fetch.augment is not None:
                    place = (self._base, at, self._runtime.rank, number)
                    batch = batch, mix_each(*place, last=torch.arange(len(key.indices)))
                yield self._placed(batch)

    def _cut(self, rest: Any, pieces: Iterator[Any], size: int) -> tuple[Any, Any]:
        """Return a batch of `size` samples, and what is left of the last piece."""
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
            except (ValueError, OSError) as error:  # its traceback may have stayed in the process that `apply` read in
                raise DataError(str(error)) from error
            except Exception as error:
                raise UserCodeError(f"{type(error).__name__}: {error}", traceback_of_user(error)) from error
            if empty:
                raise DataError(f"The stream of {type(self._dataset).__name__} has nothing for rank {rank}.")
            number += 1
