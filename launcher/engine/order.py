"""Determines the samples of each global batch, and the part of each worker.

The order depends on the seed only: global batch k of epoch e has the same samples for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Span = tuple[int, int]  # [start, stop) of positions within a global batch or a data set
# Samples are sorted by length within windows of this many global batches, at most a quarter of an epoch: with one
# window over a small data set, each batch would have the same samples in every epoch.
WINDOW = 50
# Samples are shuffled within groups of this many blocks, which a reader holds in memory at the same time.
BLOCKS = 8


class Key(NamedTuple):
    """One microbatch to read: the samples `indices` (B,), at the positions `first`, `first` + 1, … of the epoch."""

    epoch: int
    first: int
    indices: torch.Tensor


@dataclass(frozen=True)
class Order:
    """The order of the samples of a training data set.

    Args:
        length: number of samples in the data set.
        global_batch_size: samples in one optimizer step over all workers; the last batch of an epoch may be smaller.
        seed: determines the order, together with the epoch.
        only_batches: if positive, every epoch repeats the first `only_batches` batches of the unshuffled data.
        lengths: int64 (length,), tokens or frames of each sample. With it, samples of similar length share a batch,
            which
            reduces padding: the shuffled samples are sorted within windows of several global batches, and the batches
            are shuffled again. The smaller last batch is a random part of the data like the others.
        blocks: sizes of consecutive parts of the data set that are read as a whole. The parts are shuffled, and the
            samples of a few consecutive parts are shuffled together, so that few parts are read twice.
        shuffle: whether each epoch has a different order; otherwise the order is that of the data set, regardless of
            `lengths` and `blocks`.
        drop_last: omit the smaller last batch of an epoch.
        weights: float64 (length,). With it, an epoch draws `length` samples with replacement, in proportion to them.
    """

    length: int
    global_batch_size: int
    seed: int
    only_batches: int = 0
    lengths: torch.Tensor | None = field(default=None, repr=False, compare=False)
    blocks: torch.Tensor | None = field(default=None, repr=False, compare=False)
    shuffle: bool = True
    drop_last: bool = False
    weights: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.length, self.global_batch_size)
        steps = whole if self.drop_last and whole else whole + bool(rest)
        return min(steps, self.only_batches) if self.only_batches else steps

    def epoch(self, epoch: int) -> torch.Tensor:
        """Return the sample indices of one epoch in order, int64 (length,)."""
        if self.only_batches:
            return torch.arange(min(self.length, self.only_batches * self.global_batch_size))
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        if self.weights is not None:
            shuffled = self._drawn(self.weights, generator)
        elif self.blocks is None:
            shuffled = torch.randperm(self.length, generator=generator)
        else:
            shuffled = self._by_block(self.blocks, generator)
        return shuffled if self.lengths is None else self._by_length(shuffled, self.lengths, generator)

    def _drawn(self, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ends = weights.cumsum(0)  # sample i is drawn for numbers in [ends[i - 1], ends[i])
        numbers = torch.rand(self.length, generator=generator, dtype=torch.float64) * ends[-1]
        return torch.searchsorted(ends, numbers, right=True).clamp(max=int(weights.nonzero()[-1]))

    def _by_block(self, blocks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        parts = torch.arange(self.length).split(blocks.tolist())
        order = torch.randperm(len(parts), generator=generator).tolist()
        mixed = [torch.cat([parts[i] for i in order[at : at + BLOCKS]]) for at in range(0, len(order), BLOCKS)]
        return torch.cat([some[torch.randperm(len(some), generator=generator)] for some in mixed])

    def _by_length(self, shuffled: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batches, rest = divmod(self.length, self.global_batch_size)
        window = max(1, min(WINDOW, batches // 4)) * self.global_batch_size
        whole, last = shuffled.split([self.length - rest, rest])
        rows = torch.cat([_sorted(part, lengths) for part in whole.split(window)]).view(batches, -1)
        return torch.cat([rows[torch.randperm(batches, generator=generator)].flatten(), _sorted(last, lengths)])

    def batch_size(self, batch: int) -> int:
        """Return the number of samples of global batch `batch` of an epoch."""
        return min(self.length - batch * self.global_batch_size, self.global_batch_size)


def _sorted(indices: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return indices[lengths[indices].argsort(stable=True)]


@dataclass(frozen=True)
class Split:
    """Divides positions among workers and into microbatches.

    Args:
        microbatch: maximum number of samples of a microbatch, or None for the whole share.
        chunk: if set (deterministic mode), microbatches start at multiples of it, independently of the worker.
    """

    microbatch: int | None = None
    chunk: int | None = None

    def share(self, size: int, rank: int, world_size: int) -> list[Span]:
        """Return the microbatches of `rank` in a batch of `size` samples; may be empty for a small batch.

        The shares are contiguous and differ by at most one sample (one chunk in deterministic mode).
        """
        unit = self.chunk or 1
        units = -(-size // unit)
        # Rounded up, so that rank 0 is the last rank without samples.
        start, stop = (min(-(-units * r // world_size) * unit, size) for r in (rank, rank + 1))
        step = self.chunk or self.microbatch or max(stop - start, 1)
        return [(at, min(at + step, stop)) for at in range(start, stop, step)]


_MASK = 0xFFFFFFFFFFFFFFFF


def mix(*numbers: int) -> int:
    """Hash integers into a 63-bit seed (SplitMix64, Steele et al. 2014, applied in turn)."""
    state = 0
    for number in numbers:
        state = _absorbed(state, number & _MASK)
    return state >> 1


def mix_each(*numbers: int, last: torch.Tensor) -> torch.Tensor:
    """Return `mix(*numbers, n)` for each n of `last`: (B,) int64 -> (B,) int64."""
    state = 0
    for number in numbers:
        state = _absorbed(state, number & _MASK)
    return torch.from_numpy((_absorbed(state, last.numpy().astype(np.uint64)) >> 1).astype(np.int64))


def _absorbed(state: Any, number: Any) -> Any:
    """Return the next SplitMix64 state, for Python integers and for arrays of uint64, which wrap around."""
    state = (state + number + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def keys_of_training(
    order: Order, split: Split, rank: int, world_size: int, epoch: int, batch: int, last_step: int, step: int
) -> Iterator[Key]:
    """Yield the keys of this rank's microbatches from the given position to the last step, across epochs."""
    while step < last_step:
        indices = order.epoch(epoch)
        while batch < order.steps_per_epoch and step < last_step:
            first = batch * order.global_batch_size
            for start, stop in split.share(order.batch_size(batch), rank, world_size):
                yield Key(epoch, first + start, indices[first + start : first + stop])
            batch, step = batch + 1, step + 1
        epoch, batch = epoch + 1, 0


def keys_of_evaluation(order: torch.Tensor, spans: Sequence[Span]) -> Iterator[Key]:
    """Yield the keys of consecutive samples of `order`. Evaluation uses the random numbers of epoch 0."""
    for start, stop in spans:
        yield Key(0, start, order[start:stop])


def order_of_evaluation(length: int, lengths: torch.Tensor | None = None, block: int = 1) -> torch.Tensor:
    """Return the sample indices of a validation set in the order in which they are evaluated, int64 (length,).

    With `lengths`, each block (microbatch) has samples of similar length. The blocks are in a fixed random order, so
    that no worker gets all the long samples. The order does not depend on the number of workers.
    """
    if lengths is None:
        return torch.arange(length)
    blocks = lengths.argsort(stable=True).split(block)
    # A smaller block remains the last one, so that the others start at multiples of their size.
    shuffled = torch.randperm(length // block, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.cat([*(blocks[i] for i in shuffled), *blocks[length // block :]])
