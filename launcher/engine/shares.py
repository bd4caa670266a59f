"""Computes the shares of a batch for the workers of a job, before the workers are started."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config import Job
from launcher.engine.build import build_order, build_split, evaluation_order
from launcher.engine.datasets import Data
from launcher.engine.order import Split


@dataclass(frozen=True)
class Shares:
    """The division of one batch, or one validation set, among the workers.

    Attributes:
        what: name of the batch, for messages.
        size: number of samples.
        workers: for each worker, the sizes of its microbatches in order.
    """

    what: str
    size: int
    workers: tuple[tuple[int, ...], ...]

    @property
    def smallest(self) -> int:
        return min(size for worker in self.workers for size in worker)

    @property
    def are_equal(self) -> bool:
        """Whether all workers have microbatches of the same sizes in the same order."""
        return len(set(self.workers)) == 1

    @property
    def rounds_are_equal(self) -> bool:
        """Whether all workers have the same number of microbatches."""
        return len({len(worker) for worker in self.workers}) == 1

    def describe(self) -> str:
        """Return the number of samples of each worker as text, such as `27 and 26`."""
        sizes = [str(sum(worker)) for worker in self.workers]
        if len(sizes) > 4:
            sizes = [*sizes[:2], "…", sizes[-1]]
        return f"{', '.join(sizes[:-1])} and {sizes[-1]}" if len(sizes) > 1 else sizes[0]


def training_shares(job: Job, data: Data, workers: int) -> list[Shares]:
    """Return the shares of a full global batch, and of the last one of an epoch if it is smaller."""
    order, split = build_order(job, data), build_split(job)
    last = order.steps_per_epoch - 1
    full = _divide("a global batch", order.batch_size(0), split, workers)
    if order.batch_size(last) == full.size or (job.trainer.steps or last + 1) <= last:
        return [full]
    return [full, _divide("the last global batch of an epoch", order.batch_size(last), split, workers)]


def validation_shares(job: Job, data: Data, workers: int) -> list[Shares]:
    """Return the shares of each validation set."""
    found = []
    for name, dataset in data.val.items():
        _, split = evaluation_order(job, dataset, workers)
        found.append(_divide(f"the validation set {name}".rstrip(), len(dataset), split, workers))
    return found


def _divide(what: str, size: int, split: Split, workers: int) -> Shares:
    parts = (split.share(size, rank, workers) for rank in range(workers))
    return Shares(what, size, tuple(tuple(stop - start for start, stop in spans) for spans in parts))
