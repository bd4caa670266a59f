"""Gradients in fewer bytes on their way between the workers: in 16 bits, or as products of two thin matrices.

PyTorch has hooks for both. On gloo its bf16 hook is refused, and its PowerSGD hook waits for a collective inside a
thread of gloo, for ever; so these are our own, the same on gloo and NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.runtime import Runtime

WIRE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast_hook(wire: torch.dtype) -> Callable[[Runtime, Any], torch.futures.Future[Tensor]]:
    """Return a communication hook for DDP: the mean of a bucket over the workers, cast to `wire` on its way.

    It is divided before it is cast: a sum over many workers could pass what float16 holds (65,504).
    """

    def hook(runtime, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are texts
        buffer = bucket.buffer()
        buffer = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        small = buffer.div(runtime.world_size).to(wire)
        future = dist.all_reduce(small, group=runtime.group, async_op=True).get_future()

        def widen(done: Any) -> Tensor:
            buffer.copy_(done.value()[0])
            return bucket.buffer()

        return future.then(widen)

    return hook


def thin(parameter: Tensor, rank: int) -> tuple[int, int, int]:
    """Return (n, m, r) of a gradient as a matrix and as its two thin ones; r is 0 where it travels as it is."""
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return parameter.numel(), 1, 0
    n, m = parameter.shape[0], math.prod(parameter.shape[1:])
    r = min(rank, n, m)
    return n, m, r if 2 * r * (n + m) < n * m else 0


def powersgd_bytes(parameters: Iterable[Tensor], rank: int) -> int:
    """Return the bytes of gradients that PowerSGD sends in a step, the first steps left out."""
    sent = 0
    for parameter in parameters:
        n, m, r = thin(parameter, rank)
        sent += parameter.element_size() * (r * (n + m) if r else n * m)
    return sent


class PowerSGD:
    """Means of gradients over the workers by PowerSGD with error feedback (Vogels et al. 2019, algorithms 1 and 2).

    A gradient of two or more dimensions is a matrix M (n, m), to which the worker adds what it left out before. With Q
    (m, r) of the last step, P = mean(M Q) is made orthonormal, then Q = mean(Mᵀ P); P Qᵀ stands for the mean of M, and
    M - P Qᵀ is what this worker leaves out now. Matrices for which that saves less than half, and vectors, travel
    as they are, together with P: two messages a step.

    Args:
        parameters: all that are trained, in an order that all ranks share.
        rank: r, at most.
        after: steps at the beginning in which gradients travel whole.
        seed: of the first Q.

    Attributes:
        errors: what this worker has left out of each matrix, shaped like it, in float32 or float64.
        factors: Q of each matrix.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], runtime: Runtime, rank: int, after: int, seed: int) -> None:
        self._parameters = list(parameters)
        self._runtime, self._after = runtime, after
        self.steps = 0
        self.errors: dict[int, Tensor] = {}
        self.factors: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for index, parameter in enumerate(self._parameters):
            n, m, r = thin(parameter, rank)
            if r:
                wide = _wide(parameter)
                self.errors[index] = torch.zeros(n, m, dtype=wide, device=parameter.device)
                self.factors[index] = torch.randn(m, r, generator=generator).to(parameter.device, wide)

    def reduce(self) -> None:
        """Put the mean over the workers into every parameter's gradient.

        A parameter without a gradient on this worker counts as zero; one without a gradient on any keeps none.
        """
        if self._runtime.alone:
            self._settle()
            return
        compress = self.steps >= self._after
        self.steps += 1
        grads = [p.grad for p in self._parameters]
        matrices = {i: self._matrix(i, grads[i]) for i in self.errors} if compress else {}
        whole = [i for i in range(len(grads)) if i not in matrices]
        uses = torch.tensor([grad is not None for grad in grads], dtype=torch.float32, device=self._device)
        first = [matrices[i] @ self.factors[i] for i in matrices]
        first += [self._dense(i, grads[i]) for i in whole]
        *first, uses = self._mean([*first, uses])
        used = (uses > 0).tolist()
        bases = dict(zip(matrices, (orthonormal(p) for p in first[: len(matrices)]), strict=True))
        second = self._mean([matrix.T @ bases[i] for i, matrix in matrices.items()])
        for (i, matrix), factor in zip(matrices.items(), second, strict=True):
            approximation = bases[i] @ factor.T
            if used[i]:
                self.factors[i] = factor
                self.errors[i] = matrix.sub_(approximation)
            self._put(i, approximation, used[i])
        for i, mean in zip(whole, first[len(matrices) :], strict=True):
            self._put(i, mean, used[i])

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device

    def _settle(self) -> None:
        """A worker alone leaves nothing out, and makes good what it may have left out among others."""
        for index, error in self.errors.items():
            grad = self._parameters[index].grad
            if grad is not None:
                grad.add_(error.view(grad.shape))
                error.zero_()

    def _matrix(self, index: int, grad: Tensor | None) -> Tensor:
        error = self.errors[index]
        return error.clone() if grad is None else grad.reshape(error.shape).to(error.dtype) + error

    def _dense(self, index: int, grad: Tensor | None) -> Tensor:
        values = self._parameters[index].detach() if grad is None else grad
        values = torch.view_as_real(values) if values.is_complex() else values
        values = values.to(_wide(values))
        return torch.zeros_like(values) if grad is None else values

    def _put(self, index: int, mean: Tensor, used: bool) -> None:
        parameter = self._parameters[index]
        if not used:
            parameter.grad = None
            return
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        numbers = torch.view_as_real(parameter.grad) if parameter.is_complex() else parameter.grad
        numbers.copy_(mean.reshape(numbers.shape))

    def _mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the means over the ranks, in one message."""
        if not tensors:
            return []
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._runtime.add_up(flat).div_(self._runtime.world_size)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "factors": dict(self.factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for index, factor in state["factors"].items():
            self.factors[index] = factor.to(self._device)

    def load_errors(self, errors: Sequence[Mapping[int, Tensor]]) -> None:
        """Take this worker's errors; or, of several workers, their mean.

        What the weights are owed is the mean of the errors over the workers. Where each of another number of workers
        takes the mean of all that there were, it stays the same.
        """
        for index in self.errors:
            total = torch.stack([saved[index] for saved in errors]).double().mean(0)
            self.errors[index] = total.to(self._device, self.errors[index].dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which the numbers of a tensor are added up: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (n, r) of the columns of `matrix` (n, r)."""
    return torch.linalg.qr(matrix)[0]
