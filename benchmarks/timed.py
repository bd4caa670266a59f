"""The networks and the optimizer of the benchmarks: those of `models` and of PyTorch, with a stopwatch.

All compared systems run these classes, so that each is timed at the same place and in the same way, by code independent
of the system. Counting a step costs less than a microsecond.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import language, vision


class Stopwatch:
    """Times some steps in each turn of this system, and is idle until then; on rank 0, for which the others wait.

    A benchmark that listens on 127.0.0.1 (benchmarks/harness.py, `Running`) starts the turns, so that several systems
    can run at once and compute one after the other, every few seconds, and a disturbance affects all of them.

    Args:
        port: where the benchmark listens.
        warm_up: steps before the first turn.
        skipped: steps of a turn before its timing starts, in which caches warm up and the other ranks catch up.
        steps: steps of a turn that are timed.
    """

    def __init__(self, port: int, warm_up: int, skipped: int, steps: int) -> None:
        self._port = port
        self._skipped, self._steps = skipped, steps
        self._count = 0
        self._next = warm_up + 1
        self._began: tuple[float, float] | None = None
        self._link: TextIO | None = None
        self._over = False

    def note(self, facts: Callable[[], dict[str, Any]]) -> None:
        """A step begins."""
        self._count += 1
        if self._over or self._count < self._next or rank() != 0:
            return
        if self._began is None and self._link is not None:
            self._began = _clocks()
            self._next += self._steps
            return
        ended = _clocks()
        if self._link is None:
            self._link = socket.create_connection(("127.0.0.1", self._port)).makefile("rw")
            report = facts()
        else:
            assert self._began is not None
            seconds, computing = (end - begin for end, begin in zip(ended, self._began, strict=True))
            report = {"seconds": seconds, "cpu": computing}
        self._began = None
        self._next += self._skipped
        self._link.write(json.dumps(report) + "\n")
        self._link.flush()
        self._over = self._link.readline() != "go\n"


def _clocks() -> tuple[float, float]:
    """Return the seconds of a monotonic clock, and the CPU seconds of this process with all its threads."""
    return time.perf_counter(), time.process_time()


def facts(network: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return what must be equal for a fair comparison: this worker's batch, the number of workers, threads, …"""
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


class ConvNet(vision.ConvNet):
    """`models.vision.ConvNet`, with a stopwatch if `turns` is (port, warm_up, skipped, steps)."""

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        size: int = 28,
        width: int = 16,
        turns: Sequence[int] | None = None,
    ) -> None:
        super().__init__(classes, channels, size, width)
        self._stopwatch = Stopwatch(*turns) if turns else None

    def forward(self, x: Tensor) -> Tensor:
        # Neither validation, nor the tracing of the graph, nor counting FLOPs in the constructor is a step.
        stopwatch = self.__dict__.get("_stopwatch")
        if stopwatch is not None and self.training and torch.is_grad_enabled():
            stopwatch.note(lambda: facts(self, x))
        return super().forward(x)


class GPT(language.GPT):
    """`models.language.GPT`, with a stopwatch if `turns` is (port, warm_up, skipped, steps)."""

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 256,
        width: int = 192,
        layers: int = 4,
        heads: int = 3,
        tied: bool = False,
        generate: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        turns: Sequence[int] | None = None,
    ) -> None:
        super().__init__(vocabulary, context, width, layers, heads, tied, generate, temperature, top_k)
        self._stopwatch = Stopwatch(*turns) if turns else None

    def forward(self, tokens: Tensor) -> Tensor:
        if self._stopwatch is not None and self.training and torch.is_grad_enabled():
            self._stopwatch.note(lambda: facts(self, tokens))
        return super().forward(tokens)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, with a stopwatch if `turns` is set, and a file for the time of the first step."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool | None = None,
        turns: Sequence[int] | None = None,
        first_step: str | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)
        self._stopwatch = Stopwatch(*turns) if turns else None
        self._first_step = Path(first_step) if first_step else None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self._first_step is not None:
            if rank() == 0:
                self._first_step.write_text(repr(time.time()))
            self._first_step = None
        if self._stopwatch is not None:
            self._stopwatch.note(lambda: {"workers": workers(), "threads": torch.get_num_threads()})
        return loss
