"""Common types of the runners of sweeps: the resources that a task needs, and its outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import LaunchError


@dataclass(frozen=True)
class Shape:
    """The resources of a task: the number of workers, and the CPUs and GPUs of each."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float


@dataclass(frozen=True)
class TaskOutcome:
    """The outcome of a task: rank 0's result, or an error, or `interrupted` before training started."""

    key: str
    result: dict[str, Any] | None = None
    error: LaunchError | None = None
    interrupted: bool = False


def fits(shapes: Sequence[Shape], cpus: float, gpus: float) -> bool:
    """Return whether groups of these shapes fit at the same time. A fraction of a GPU is on one GPU."""
    if sum(shape.workers * shape.cpus_per_worker for shape in shapes) > cpus + 1e-6:
        return False
    free = [1.0] * math.floor(gpus + 1e-6)
    shares = [shape.gpus_per_worker for shape in shapes for _ in range(shape.workers) if shape.gpus_per_worker > 0]
    for share in sorted(shares, reverse=True):
        whole = math.ceil(share - 1e-6) if share >= 1 else 1
        places = [i for i, left in enumerate(free) if left >= min(share, 1.0) - 1e-6][:whole]
        if len(places) < whole:
            return False
        for place in places:
            free[place] -= min(share, 1.0)
    return True
