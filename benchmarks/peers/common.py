"""Shared by the peers: arguments and data, without code of `launch`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from benchmarks import timed
from models.vision_data import Mnist


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--batch", type=int, required=True, help="samples in a step, over all workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", required=True, help="where TensorBoard's file goes")
    parser.add_argument("--turns", type=json.loads, help="arguments of the stopwatch, see benchmarks/timed.py")
    return parser


def first_step_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of peers whose first step is timed (benchmarks/startup.py)."""
    parser.add_argument("--first-step", required=True, help="file for the time of the first step")
    parser.add_argument("--limit", type=int, help="number of training images")
    return parser


def shared_loader(data: Dataset[Any], batch: int, **how: Any) -> tuple[DataLoader[Any], DistributedSampler[Any]]:
    """Return the loader of a rank's part of every batch of `batch` samples."""
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=True)
    return DataLoader(data, batch_size=batch // dist.get_world_size(), sampler=sampler, **how), sampler


def steps(
    loader: Iterable[Any], total: int, sampler: DistributedSampler[Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the step from 1, batch), over as many epochs as `total` steps take."""
    step, epoch = 0, 0
    while True:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            step += 1
            yield step, batch
            if step == total:
                return
        epoch += 1


def network(options: argparse.Namespace) -> timed.ConvNet:
    return timed.ConvNet(turns=options.turns)


def training_data(limit: int | None = None) -> TensorDataset:
    """Return the digits with the normalization of `launch`: x (N, 1, 28, 28) float32, y (N,) int64."""
    pictures = Mnist(limit=limit).train
    return TensorDataset(*pictures.__getitems__(range(len(pictures))))
