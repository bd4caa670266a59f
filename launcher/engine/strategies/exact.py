"""Data parallel whose result does not depend on the number of workers, to the last bit (`trainer.deterministic`).

Microbatches ("chunks") are cut by position in the global batch, so that each chunk is computed by the same kernels on
the same numbers wherever it runs. Their gradients are rounded to multiples of 2**-40 and added as 64-bit integers:
integer addition is associative, so neither the grouping by worker nor the order of the reduction can change the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import TrainerConfig
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.strategy import Record, Strategy, loss_of
from launcher.errors import TrainingError

_UNIT = 2.0**-40
# |gradient of the summed loss over the global batch| that still fits into 63 bits, with one bit to spare: 4.2 million.
_LIMIT = 2.0**22


class ExactDataParallel(Strategy):
    """Fixed-point sums of gradients, without DDP. The cost is in docs/exactness.md.

    Args:
        chunk: samples in a chunk; see `data.Split`.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, chunk: int) -> None:
        super().__init__(model, runtime, trainer)
        self._chunk = chunk
        self._parameters: list[nn.Parameter] = []
        self._sum = torch.empty(0)

    def prepare(self, batch: Any) -> dict[str, Any]:
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng(devices):
            answer = self._steps(batch)
            loss_of(answer)[0].backward()
        self._parameters = [p for p in self.model.parameters() if p.grad is not None]
        numel = sum(p.numel() for p in self._parameters)
        self._sum = torch.zeros(numel, dtype=torch.int64, device=self.runtime.device)
        for parameter in self._parameters:
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        self._broadcast()
        return answer

    def _broadcast(self) -> None:
        if self.runtime.alone:
            return
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            torch.distributed.broadcast(tensor.detach(), src=0, group=self.runtime.group)

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        self._clear()  # what `apply` left for `grad_norm`
        self._sum.zero_()
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        flags["overflow"] = False
        limit = _LIMIT / _UNIT / -(-size // self._chunk)  # each chunk's part of the range
        for batch in batches:
            answer = self._steps(batch)
            loss, count = loss_of(answer)
            total += count
            loss.backward()
            if not bool(torch.isfinite(loss)):
                flags["bad"] = True
            elif not self._add(limit):
                flags["overflow"] = True
            record(answer)
            self._clear()
        # Counts are whole numbers or weights; multiples of 2**-20 add exactly in float64 up to 2**33.
        vote = self.runtime.vote(torch.round(total * 2**20) / 2**20, flags)
        if not (flags["bad"] or flags["overflow"]):
            self.runtime.add_up(self._sum)
        else:
            self.runtime.add_up(self._sum.zero_())
        return vote.wait()

    def _add(self, limit: float) -> bool:
        """Add the chunk's gradients to the sum; tell whether they fit."""
        at = 0
        grads = [p.grad for p in self._parameters]
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None:
                scaled = torch.round(grad.double() / _UNIT)
                if not bool((scaled.abs().max() if scaled.numel() else scaled.sum()) < limit):
                    return False
                self._sum[at : at + grad.numel()] += scaled.long().reshape(-1)
            at += parameter.numel()
        return True

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        if vote.ballots["overflow"]:
            raise TrainingError(
                f"trainer.deterministic=true adds gradients in fixed point, and one of them passed ±{_LIMIT:.0f} (or is not a "
                "number). Lower optimizer.lr or set trainer.clip_norm; or train with trainer.deterministic=false."
            )
        at = 0
        count = vote.count.item()
        for parameter in self._parameters:
            mean = self._sum[at : at + parameter.numel()].double() * _UNIT / count
            # .grad keeps the parameter's own memory layout, which the optimizer's kernels expect.
            parameter.grad = torch.empty_like(parameter).copy_(mean.view(parameter.shape))
            at += parameter.numel()
        self._clip_and_step(optimizer, [p.grad for p in self._parameters if p.grad is not None])
