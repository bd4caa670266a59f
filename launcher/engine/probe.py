"""Measures the latency and bandwidth between the workers with a few short all-reduces."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from launcher.engine.cost import Link

_REPEATS = 5
_MAX_BYTES = 4 * 2**20
_ENOUGH_SECONDS = 0.05  # the duration of a message that is large enough for the fit


def measure(group: Any, device: torch.device) -> Link:
    """Measure the link between all ranks of `group`. A collective; the result may differ slightly between ranks.

    Messages grow from 64 KiB until one takes 50 ms, up to 4 MiB. The measurement takes milliseconds in a data centre's
    network, and less than half a second at 100 Mbit/s.
    """
    workers = dist.get_world_size(group)
    nothing = _seconds(group, device, 1, _REPEATS)
    before = (4.0, nothing)
    numbers = 2**14
    while True:
        large = _seconds(group, device, numbers, 2)
        # All ranks must agree on whether another message follows, so the slowest rank decides.
        slowest = torch.tensor([large], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        this = (4.0 * numbers, slowest.item())
        if slowest.item() > _ENOUGH_SECONDS or 4 * numbers >= _MAX_BYTES:
            return Link.fitted(workers, nothing, before, this)
        before, numbers = this, 4 * numbers


def _seconds(group: Any, device: torch.device, numbers: int, repeats: int) -> float:
    """Return the median seconds of an all-reduce of `numbers` float32, after one warm-up."""
    message = torch.zeros(numbers, device=device)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        dist.all_reduce(message, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
