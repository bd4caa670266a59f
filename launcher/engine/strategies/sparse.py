"""Sparse gradients, which `nn.Embedding(..., sparse=True)` has: rows and their numbers instead of a whole table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError


def has_sparse_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


def refuse_sparse(parameters: Iterable[nn.Parameter], what: str) -> None:
    """Raise ConfigError where a parameter has a sparse gradient. what: the setting that cannot work with it."""
    if any(has_sparse_gradient(p) for p in parameters):
        raise ConfigError(refusal_of_sparse("an embedding", what))


def refuse_mixed(model: nn.Module) -> None:
    """Raise ConfigError where a weight has sparse gradients in one place of the network and dense ones in another."""
    for name, module in model.named_modules():
        table = getattr(module, "weight", None) if getattr(module, "sparse", False) is True else None
        if isinstance(table, nn.Parameter) and table.grad is not None and not table.grad.is_sparse:
            raise ConfigError(
                f"{name}.weight belongs to an embedding with sparse=True, and another part of the network uses it too, "
                "so that its gradient is dense. Build the embedding with sparse=False."
            )


def refusal_of_sparse(name: str, what: str) -> str:
    return (
        f"The gradient of {name} is sparse, which {what} does not support. Build the embedding with sparse=False, or "
        "train with strategy=ddp strategy.compression=none trainer.deterministic=false."
    )


def coalesce(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the rows that a sparse gradient holds several times, so that its values are those of the gradient."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:  # that of a worker without samples is dense
            parameter.grad = parameter.grad.coalesce()


def dense_parts(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return the numbers of the gradients, as views: of sparse ones, which must be coalesced, the values."""
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]


def average(parameters: Sequence[nn.Parameter], runtime: Runtime) -> None:
    """Replace sparse gradients by their mean over the workers, each of which sends its rows; a collective.

    A worker without a sparse gradient, such as one that had no sample, sends no rows. A parameter for which there are
    none at all has no gradient afterwards.
    """
    own = [p.grad if has_sparse_gradient(p) else None for p in parameters]
    counts = torch.tensor([0 if one is None else one._nnz() for one in own], device=runtime.device)
    counted = _gathered(counts, runtime)
    for index, (parameter, gradient) in enumerate(zip(parameters, own, strict=True)):
        numbers = [int(one[index]) for one in counted]
        most = max(numbers)
        if not most:
            parameter.grad = None
            continue
        rows = torch.zeros(most, dtype=torch.long, device=runtime.device)
        values = torch.zeros(most, *parameter.shape[1:], dtype=parameter.dtype, device=runtime.device)
        if gradient is not None:
            rows[: gradient._nnz()] = gradient._indices()[0]
            values[: gradient._nnz()] = gradient._values()
        together = [
            torch.cat([part[:number] for part, number in zip(_gathered(one, runtime), numbers, strict=True)])
            for one in (rows, values)
        ]
        mean = together[1] / runtime.world_size
        parameter.grad = torch.sparse_coo_tensor(
            together[0][None], mean, parameter.shape, check_invariants=False
        ).coalesce()


def _gathered(tensor: Tensor, runtime: Runtime) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(runtime.world_size)]
    dist.all_gather(parts, tensor, group=runtime.group)
    return parts
