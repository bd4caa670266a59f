"""Data parallelism with bit-identical results for any number of workers (`trainer.deterministic=true`).

The global batch is divided into microbatches ("chunks") by position, so each chunk is computed by the same kernels on
the same numbers on every worker. Gradients are rounded to multiples of 2**-40 and added as 64-bit integers. Integer
addition is associative, so the sum does not depend on the grouping by worker or on the order of the reduction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import TrainerConfig
from launcher.engine.metrics import LIMBS, from_limbs, to_limbs
from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.sparse import refuse_sparse
from launcher.engine.strategies.strategy import Record, Strategy, loss_of
from launcher.engine.tensors import as_real
from launcher.errors import TrainingError

_UNIT = 2.0**-40
# Maximum |gradient of the summed loss over the global batch| that fits into 63 bits, with one spare bit: 4.2 million.
_LIMIT = 2.0**22


class ExactDataParallel(Strategy):
    """Sums gradients in fixed point, without DDP. docs/exactness.md describes the cost.

    Args:
        chunk: number of samples in a chunk; see `order.Split`.
    """

    follows = True

    def __init__(self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, chunk: int) -> None:
        super().__init__(model, runtime, trainer)
        self._chunk = chunk
        self._bad: str | None = None  # a parameter whose gradient in a chunk was not finite
        self._places: list[slice] = []
        self._sum = self._uses = self._count = torch.empty(0)

    def prepare(self, batch: Any) -> dict[str, Any]:
        self._broadcast()
        return self._wrap(batch)

    def rewrap(self, batch: Any) -> None:
        self._wrap(batch)

    def _wrap(self, batch: Any) -> dict[str, Any]:
        with preserve_model(self.model, self.runtime.device):
            answer = self._warm_up(self._steps, batch)
            refuse_sparse(self.model.parameters(), "trainer.deterministic=true")
            # Also parameters without a gradient: another batch may use them.
            self._parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.uses_all = all(p.grad is not None for p in self._parameters)
        sizes = [as_real(p.detach()).numel() for p in self._parameters]
        ends = list(accumulate(sizes))
        self._places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        # After the gradients: the number of chunks in which each parameter had one, and the count of the loss.
        numel = ends[-1] + len(ends) + LIMBS
        self._sum = torch.zeros(numel, dtype=torch.int64, device=self.runtime.device)
        self._uses, self._count = self._sum[ends[-1] : -LIMBS], self._sum[-LIMBS:]
        return answer

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        self._clear()  # `apply` leaves the gradients for `grad_norm`
        self._sum.zero_()
        flags |= {"overflow": False, "gradient": False}
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        limit = _LIMIT / -(-size // self._chunk)  # of each chunk
        for batch in batches:
            answer = self._steps(batch)
            loss, count = loss_of(answer)
            total += count
            self._count += to_limbs(count).to(self._count.device)
            loss.backward()
            if not bool(torch.isfinite(loss)):
                flags["bad"] = True
            elif not self._add(limit):
                self._bad = super().bad_gradient()
                flags["overflow" if self._bad is None else "gradient"] = True
            record(answer)
            self._clear()
        vote = self.runtime.vote(total, flags)
        if not (flags["bad"] or flags["overflow"] or flags["gradient"]):
            self.runtime.add_up(self._sum)
        else:
            self.runtime.add_up(self._sum.zero_())
        return vote.wait()

    def _add(self, limit: float) -> bool:
        """Add the gradients of a chunk to the sum; return whether they are in range (NaN is not)."""
        grads = [None if p.grad is None else as_real(p.grad) for p in self._parameters]
        present = [grad for grad in grads if grad is not None and grad.numel()]
        if not present:
            return True
        largest = torch.stack([norm.double() for norm in torch._foreach_norm(present, math.inf)]).max()
        if not bool(largest < limit):
            return False
        for place, grad in zip(self._places, grads, strict=True):
            if grad is not None:
                self._sum[place] += torch.round(grad.double() / _UNIT).long().reshape(-1)
        self._uses += torch.tensor([grad is not None for grad in grads], device=self._uses.device)
        return True

    def bad_gradient(self) -> str | None:
        return self._bad

    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        if vote.votes["overflow"]:
            raise TrainingError(
                f"trainer.deterministic=true adds gradients in fixed point, and a gradient exceeded ±{_LIMIT:.0f} (or "
                "is NaN). Lower optimizer.lr, set trainer.clip_norm, or train with trainer.deterministic=false."
            )
        # Without any token in the global batch the sum is zero, and so is the mean.
        count = max(from_limbs(self._count).item(), 1e-30)
        for parameter, place, uses in zip(self._parameters, self._places, self._uses.tolist(), strict=True):
            if uses:
                mean = self._sum[place].double() * _UNIT / count
                # Kernels of optimizers expect the memory layout of the parameter.
                parameter.grad = torch.empty_like(parameter)
                numbers = as_real(parameter.grad)
                numbers.copy_(mean.view(numbers.shape))
        self._clip_and_step(optimizer, [p.grad for p in self._parameters if p.grad is not None])
