"""Latency and bandwidth between the workers, from a few short all-reduces."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from launcher.engine.cost import Link

_REPEATS = 5
_LARGEST = 4 * 2**20
_PATIENCE = 0.05  # seconds: a message that takes as long is large enough


def measure(group: Any, device: torch.device) -> Link:
    """Measure the link between all ranks of `group`; every rank calls it, and gets its own result.

    Messages grow from 64 KiB until one takes 50 ms, up to 4 MiB: milliseconds in all on a data centre's network, and
    less than half a second at 100 Mbit/s.
    """
    workers = dist.get_world_size(group)
    nothing = _seconds(group, device, 1, _REPEATS)
    before = (4.0, nothing)
    numbers = 2**14
    while True:
        large = _seconds(group, device, numbers, 2)
        # All ranks must agree on whether another message follows: they ask what the slowest has seen.
        slowest = torch.tensor([large], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        this = (4.0 * numbers, slowest.item())
        if slowest.item() > _PATIENCE or 4 * numbers >= _LARGEST:
            return Link.fitted(workers, nothing, before, this)
        before, numbers = this, 4 * numbers


def _seconds(group: Any, device: torch.device, numbers: int, repeats: int) -> float:
    """Return the median seconds of an all-reduce of so many float32, without the first."""
    message = torch.zeros(numbers, device=device)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        dist.all_reduce(message, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
