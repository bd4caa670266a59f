"""What the peers share: arguments, data, and nothing of `launch`."""

from __future__ import annotations

import argparse
import json

from torch.utils.data import TensorDataset

from benchmarks import timed
from models.vision_data import Mnist


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--batch", type=int, required=True, help="samples in a step, over all workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", required=True, help="where TensorBoard's file goes")
    parser.add_argument("--turns", type=json.loads, help="what the stopwatch is told, see benchmarks/timed.py")
    return parser


def network(options: argparse.Namespace) -> timed.ConvNet:
    return timed.ConvNet(turns=options.turns)


def training_data(limit: int | None = None) -> TensorDataset:
    """The digits as `launch` sees them, normalised once and for all: x (N, 1, 28, 28) float32, y (N,) int64."""
    pictures = Mnist(limit=limit).train
    return TensorDataset(*pictures.__getitems__(range(len(pictures))))
