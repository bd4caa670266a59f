"""Gradient compression: all-reduce in 16 bits, or as low-rank matrix products (PowerSGD).

PyTorch has communication hooks for both. With gloo, its bf16 hook raises an error and its PowerSGD hook deadlocks,
because it waits for a collective inside a thread of gloo. The implementations here work with gloo and NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.runtime import Runtime
from launcher.engine.tensors import as_real

WIRE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast_hook(wire: torch.dtype) -> Callable[[Runtime, Any], torch.futures.Future[Tensor]]:
    """Return a communication hook for DDP that averages a bucket over the workers in the dtype `wire`.

    The bucket is divided before the cast, because a sum over many workers can exceed the range of float16 (65,504).
    """

    def hook(runtime, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations that are strings
        buffer = bucket.buffer()
        buffer = as_real(buffer)
        small = buffer.div(runtime.world_size).to(wire)
        future = dist.all_reduce(small, group=runtime.group, async_op=True).get_future()

        def widen(done: Any) -> Tensor:
            buffer.copy_(done.value()[0])
            return bucket.buffer()

        return future.then(widen)

    return hook


def thin(parameter: Tensor, rank: int) -> tuple[int, int, int]:
    """Return (n, m, r): the gradient as a matrix (n, m) and its rank r after compression; r = 0 for no compression."""
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return parameter.numel(), 1, 0
    n, m = parameter.shape[0], math.prod(parameter.shape[1:])
    r = min(rank, n, m)
    return n, m, r if 2 * r * (n + m) < n * m else 0


def powersgd_bytes(parameters: Iterable[Tensor], rank: int) -> int:
    """Return the bytes of gradients that PowerSGD sends per step, after the uncompressed first steps."""
    sent = 0
    for parameter in parameters:
        n, m, r = thin(parameter, rank)
        sent += parameter.element_size() * (r * (n + m) if r else n * m)
    return sent


class PowerSGD:
    """Averages gradients over the workers by PowerSGD with error feedback (Vogels et al. 2019, algorithms 1 and 2).

    A gradient of two or more dimensions is a matrix M (n, m), to which the worker adds its approximation error of the
    previous step. With Q (m, r) of the previous step, P = mean(M Q) is orthonormalized, then Q = mean(Mᵀ P). P Qᵀ
    approximates the mean of M, and M - P Qᵀ is the new error of this worker. Vectors, and matrices for which this saves
    less than half of the bytes, are sent uncompressed, together with P. A step needs two messages.

    Args:
        parameters: all trained parameters, in the same order on all ranks.
        rank: the maximum of r.
        after: number of first steps without compression.
        seed: seed of the initial Q.

    Attributes:
        errors: approximation error of each matrix on this worker, of the matrix's shape, in float32 or float64.
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
        """Replace the gradient of every parameter by its mean over the workers.

        A missing gradient counts as zero. A parameter without a gradient on all workers gets none.
        """
        if self._runtime.alone:
            self._add_errors()
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

    def _add_errors(self) -> None:
        """Add the errors to the gradients: a single worker does not compress, but may resume a run that did."""
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
        values = as_real(values)
        values = values.to(_wide(values))
        return torch.zeros_like(values) if grad is None else values

    def _put(self, index: int, mean: Tensor, used: bool) -> None:
        parameter = self._parameters[index]
        if not used:
            parameter.grad = None
            return
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        numbers = as_real(parameter.grad)
        numbers.copy_(mean.reshape(numbers.shape))

    def _mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the means over the ranks, computed in one all-reduce."""
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
        """Load this worker's errors, or the mean of the errors of several workers.

        Only the mean of the errors over the workers affects the weights. If the number of workers has changed, each
        worker loads the mean over all previous workers, which preserves it.
        """
        for index in self.errors:
            total = torch.stack([saved[index] for saved in errors]).double().mean(0)
            self.errors[index] = total.to(self._device, self.errors[index].dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which the values of a tensor are summed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (n, r) of the columns of `matrix` (n, r)."""
    return torch.linalg.qr(matrix)[0]
