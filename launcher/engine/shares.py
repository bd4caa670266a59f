"""The shares of a batch that the workers of a job get, worked out before any of them exists."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config import Job
from launcher.engine.build import build_order, build_split, evaluation_order
from launcher.engine.datasets import Data
from launcher.engine.order import Split


@dataclass(frozen=True)
class Shares:
    """How one batch, or one validation set, is divided.

    Attributes:
        what: the batch, for a message.
        size: its samples.
        workers: of each worker, the sizes of the microbatches that it puts through the network, one after the other.
    """

    what: str
    size: int
    workers: tuple[tuple[int, ...], ...]

    @property
    def smallest(self) -> int:
        return min(size for worker in self.workers for size in worker)

    @property
    def are_equal(self) -> bool:
        """Whether all workers have microbatches of the same sizes, in the same order."""
        return len(set(self.workers)) == 1

    @property
    def rounds_are_equal(self) -> bool:
        """Whether all workers have equally many microbatches."""
        return len({len(worker) for worker in self.workers}) == 1

    def described(self) -> str:
        """Return `27 and 26`: the samples of each worker."""
        sizes = [str(sum(worker)) for worker in self.workers]
        if len(sizes) > 4:
            sizes = [*sizes[:2], "…", sizes[-1]]
        return f"{', '.join(sizes[:-1])} and {sizes[-1]}" if len(sizes) > 1 else sizes[0]


def training_shares(job: Job, data: Data, workers: int) -> list[Shares]:
    """Return the shares of a global batch of the usual size, and of the last one of an epoch where it is smaller."""
    order, split = build_order(job, data), build_split(job)
    last = order.steps_per_epoch - 1
    usual = _divided("a global batch", order.batch_size(0), split, workers)
    if order.batch_size(last) == usual.size or (job.trainer.steps or last + 1) <= last:
        return [usual]
    return [usual, _divided("the last global batch of an epoch", order.batch_size(last), split, workers)]


def validation_shares(job: Job, data: Data, workers: int) -> list[Shares]:
    """Return the shares of each validation set."""
    found = []
    for name, dataset in data.val.items():
        _, split = evaluation_order(job, dataset, workers)
        found.append(_divided(f"the validation set {name}".rstrip(), len(dataset), split, workers))
    return found


def _divided(what: str, size: int, split: Split, workers: int) -> Shares:
    parts = (split.share(size, rank, workers) for rank in range(workers))
    return Shares(what, size, tuple(tuple(stop - start for start, stop in spans) for spans in parts))
