"""The networks and the optimizer of the benchmarks: those of `models` and of PyTorch, with a stopwatch inside.

Every system that is compared runs these very classes, so that each is timed in the same place and in the same way, by
code that knows nothing of it. One stamp costs a microsecond.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import vision


class Stopwatch:
    """Notes when each pass began, and writes the file when `passes` of them have begun; on rank 0 only.

    What the file holds: `passes`, seconds of an arbitrary clock; `cpu`, seconds that this process has computed by then;
    and the facts that must be the same for a fair comparison (batch of this worker, workers, threads, parameters,
    dtype, memory layout).
    """

    def __init__(self, file: str, passes: int) -> None:
        self._file = Path(file)
        self._wanted = passes
        self._passes: list[float] = []
        self._cpu: list[float] = []

    def note(self, network: nn.Module, x: Tensor) -> None:
        if len(self._passes) == self._wanted:
            return
        self._passes.append(time.perf_counter())
        self._cpu.append(time.process_time())
        if len(self._passes) == self._wanted and rank() == 0:
            write(self._file, {"passes": self._passes, "cpu": self._cpu, "facts": facts(network, x)})


def facts(network: nn.Module, x: Tensor) -> dict[str, Any]:
    weights = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
    return {
        "batch": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "workers": workers(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "channels_last": bool(weights)
        and all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights),
    }


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def write(file: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all: somebody may be waiting for it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


class _Timed(nn.Module):
    _stopwatch: Stopwatch | None = None

    def forward(self, x: Tensor) -> Tensor:
        # Neither validation nor the tracing of the graph is a step.
        if self._stopwatch is not None and self.training and torch.is_grad_enabled():
            self._stopwatch.note(self, x)
        return super().forward(x)


class ConvNet(_Timed, vision.ConvNet):
    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        size: int = 28,
        width: int = 16,
        stopwatch: str | None = None,
        passes: int = 0,
    ) -> None:
        super().__init__(classes, channels, size, width)
        self._stopwatch = Stopwatch(stopwatch, passes) if stopwatch else None  # after the FLOPs were counted by a pass


class AdamW(torch.optim.AdamW):
    """Writes the file when `steps` steps are done, on rank 0 only.

    What the file holds: `first_step`, time.time() after the first of them; `steps`, seconds of an arbitrary clock after
    each; and the number of workers and threads.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool | None = None,
        stopwatch: str | None = None,
        steps: int = 1,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)
        self._stopwatch = Path(stopwatch) if stopwatch else None
        self._wanted = steps
        self._first = 0.0
        self._steps: list[float] = []

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self._stopwatch is not None:
            if not self._steps:
                self._first = time.time()
            self._steps.append(time.perf_counter())
            if len(self._steps) == self._wanted:
                if rank() == 0:
                    content = {"threads": torch.get_num_threads(), "workers": workers()}
                    write(self._stopwatch, {"first_step": self._first, "steps": self._steps, "facts": content})
                self._stopwatch = None
        return loss
