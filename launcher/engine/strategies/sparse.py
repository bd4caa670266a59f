"""Sparse gradients, as of `nn.Embedding(..., sparse=True)`: some rows with their indices instead of a full table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError


def has_sparse_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


def refuse_sparse(parameters: Iterable[nn.Parameter], setting: str) -> None:
    """Raise ConfigError if a parameter has a sparse gradient. setting: the option that does not support it."""
    if any(has_sparse_gradient(p) for p in parameters):
        raise ConfigError(refusal_of_sparse("an embedding", setting))


def refuse_mixed(model: nn.Module) -> None:
    """Raise ConfigError if a weight has sparse gradients in one part of the network and dense ones in another."""
    for name, module in model.named_modules():
        table = getattr(module, "weight", None) if getattr(module, "sparse", False) is True else None
        if isinstance(table, nn.Parameter) and table.grad is not None and not table.grad.is_sparse:
            raise ConfigError(
                f"{name}.weight belongs to an embedding with sparse=True, but its gradient is dense because another "
                "part of the network uses it too. Build the embedding with sparse=False."
            )


def refusal_of_sparse(name: str, setting: str) -> str:
    """Return the message for a sparse gradient that a setting does not support."""
    return (
        f"The gradient of {name} is sparse, which {setting} does not support. Build the embedding with sparse=False, "
        "or train with strategy=ddp strategy.compression=none trainer.deterministic=false."
    )


def coalesce(parameters: Iterable[nn.Parameter]) -> None:
    """Coalesce sparse gradients: sum duplicate rows, so that each value is a value of the gradient."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:  # dense on a worker without samples
            parameter.grad = parameter.grad.coalesce()


def dense_parts(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return dense views of the gradients: of sparse ones, which must be coalesced, the values."""
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]


def average(parameters: Sequence[nn.Parameter], runtime: Runtime) -> None:
    """Replace sparse gradients by their mean over the workers. A collective in which each worker sends its rows.

    A worker without a sparse gradient, for example without samples, sends no rows. A parameter without rows on all
    workers has no gradient afterwards.
    """
    own = [p.grad if has_sparse_gradient(p) else None for p in parameters]
    counts = torch.tensor([0 if one is None else one._nnz() for one in own], device=runtime.device)
    counts_by_rank = _all_gather(counts, runtime)
    for index, (parameter, gradient) in enumerate(zip(parameters, own, strict=True)):
        numbers = [int(one[index]) for one in counts_by_rank]
        most = max(numbers)
        if not most:
            parameter.grad = None
            continue
        rows = torch.zeros(most, dtype=torch.long, device=runtime.device)
        values = torch.zeros(most, *parameter.shape[1:], dtype=parameter.dtype, device=runtime.device)
        if gradient is not None:
            rows[: gradient._nnz()] = gradient._indices()[0]
            values[: gradient._nnz()] = gradient._values()
        all_rows, all_values = (
            torch.cat([part[:number] for part, number in zip(_all_gather(one, runtime), numbers, strict=True)])
            for one in (rows, values)
        )
        mean = all_values / runtime.world_size
        parameter.grad = torch.sparse_coo_tensor(
            all_rows[None], mean, parameter.shape, check_invariants=False
        ).coalesce()


def _all_gather(tensor: Tensor, runtime: Runtime) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(runtime.world_size)]
    dist.all_gather(parts, tensor, group=runtime.group)
    return parts
