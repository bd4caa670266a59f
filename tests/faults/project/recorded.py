"""A user's model and data that record which samples each worker used in each step."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

_used: list[int] = []  # since the last step of this process


class Rows(Dataset):
    """Numbers with their row, so that the model can record it."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 8, generator=generator)
        self.y = self.x.sum(dim=1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.x[index], self.y[index]


class Data:
    def __init__(self, samples: int) -> None:
        self.train, self.val = Rows(samples), Rows(20)


class Network(nn.Module):
    """A small network. seconds: the extra time of a microbatch, during which a fault can be applied."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.seconds = seconds

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        rows, x, y = batch
        if self.training and type(rows) is Tensor and rows.device.type != "meta":
            _used.extend(rows.tolist())
        if self.training:
            time.sleep(self.seconds)
        return {"loss": F.mse_loss(self.net(x), y, reduction="none")}


class History:
    """Writes a file per process: facts about the process, then a line per step. A group has one `attempt`."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_start(self, run: Any) -> None:
        attempt = [uuid.uuid4().hex[:8]]
        if dist.is_initialized() and run.world_size > 1:
            dist.broadcast_object_list(attempt)
        name = f"{time.time_ns()}-{run.rank}-{os.getpid()}.jsonl"
        facts = {"attempt": attempt[0], "rank": run.rank, "world_size": run.world_size, "pid": os.getpid()}
        self.file = (self.directory / name).open("w")
        self._write({**facts, "host": os.uname().nodename, "from": run.step})
        _used.clear()

    def on_step(self, run: Any) -> None:
        self._write({"step": run.step, "rows": list(_used)})
        _used.clear()

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps({**line, "time": time.time()}) + "\n")
        self.file.flush()
