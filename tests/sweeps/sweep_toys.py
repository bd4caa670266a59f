"""A fast job for the tests of sweeps: linear regression with a known best learning rate."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn


class Line(nn.Module):
    """Linear regression with full batches. With SGD the error decreases fastest near lr = 0.5, and increases above 1.

    Args:
        nap: seconds that each step takes.
    """

    def __init__(self, nap: float = 0.0, start: float = 3.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), float(start)))
        self.nap = nap

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(self.nap)
        x, y = batch
        return {"loss": (x @ self.weight - y) ** 2, "size": self.weight.abs().sum().expand(len(y))}


class Points:
    """Whitened points, so that the loss has the same curvature in every direction.

    Args:
        trouble: "" for none; "raise" fails on construction; "kill" kills the process of rank 1 once, at sample `at`.
        flag: a file that is created before the process is killed.
    """

    def __init__(self, count: int = 40, trouble: str = "", at: int = 10, flag: str = "") -> None:
        if trouble == "raise":
            raise ValueError("points.csv, row 7: not a number")
        x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        x, _ = torch.linalg.qr(x)
        self.x = x * count**0.5
        self.y = self.x @ torch.arange(4.0)
        self._kill = trouble == "kill"
        self._at, self._flag = at, flag
        self.train = self.val = self

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kill and torch.distributed.is_initialized():
            self._perhaps_die()
        return self.x[index], self.y[index]

    def _perhaps_die(self) -> None:
        self._at -= 1
        if torch.distributed.get_rank() == 1 and self._at <= 0 and not os.path.exists(self._flag):
            open(self._flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
