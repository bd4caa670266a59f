"""Checks the optimizer and the schedule at the start, with one step over small placeholder parameters.

Arguments that a class rejects, and classes that do not work with the engine, are reported before a run directory
exists.
The check needs no second model: each parameter group gets one placeholder per kind of parameter in it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import Job, targets
from launcher.engine.construct import construct, rejection
from launcher.engine.optim import parameter_groups
from launcher.engine.randomness import preserve_random_states
from launcher.engine.schedules import Schedule
from launcher.engine.strategies.kinds.base import kind_of
from launcher.engine.strategies.sparse import refusal_of_sparse
from launcher.errors import ConfigError, LaunchError

_SIDE = 16  # maximum length of a dimension of a placeholder
_MAX_STEPS = 2000  # steps of a schedule that are tried, besides the last one


def try_optimizer(job: Job, model: nn.Module) -> tuple[Optimizer, int]:
    """Step the job's optimizer once over placeholder parameters. Freezes parameters of the model as configured.

    Returns:
        The optimizer, and the bytes of its state for the whole model.

    Raises:
        ConfigError: the class rejects its arguments, the parameters or their gradients, or needs a closure.
    """
    section = {key: value for key, value in job.optimizer.items() if key not in ("groups", "capturable")}
    kind = targets.resolve(section["_target_"], "optimizer", job.trust)
    _refuse_closure(kind, section["_target_"])
    sparse = sparse_parameters(model)
    _refuse_sparse(job, sparse)
    groups, numels = _placeholder_groups(model, job.optimizer.get("groups") or [], sparse)
    for group in groups:
        overrides = {key: value for key, value in group.items() if key != "params"}
        if overrides:  # torch validates only the defaults, not the values of groups
            targets.check_signature({**section, **overrides}, "optimizer", job.trust)
            construct({**section, **overrides}, "optimizer", job.trust, params=[nn.Parameter(torch.zeros(2, 2))])
    optimizer = construct(section, "optimizer", job.trust, params=groups)
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), bool) or not isinstance(group.get("lr"), (int, float, torch.Tensor)):
            raise ConfigError(
                f"optimizer.lr is {group.get('lr')!r}, but every group of {section['_target_']} needs a number: "
                "schedules and the log read it. Set optimizer.lr.",
                key="optimizer.lr",
            )
    _step(optimizer, section, job)
    each = {
        small: sum(value.nbytes for value in _state(optimizer, small) if value.ndim > 0) / max(1, small.numel())
        for small in numels
    }
    return optimizer, math.ceil(sum(each[small] * numel for small, numel in numels.items()))


def optimizer_bytes(job: Job, model: nn.Module) -> int:
    """Return the bytes of the optimizer state for the model; raises the errors of `try_optimizer`."""
    return try_optimizer(job, model)[1]


def try_schedule(job: Job, optimizer: Optimizer, total_steps: int, steps_per_epoch: int, evaluates: bool) -> None:
    """Build the job's schedule over the optimizer of `try_optimizer`, and step it as in a run.

    Args:
        evaluates: whether the job has validation data.

    Raises:
        ConfigError: the schedule cannot be built, or cannot be stepped to the end of the run.
    """
    section, checkpoint = job.scheduler, job.checkpoint
    with warnings.catch_warnings():
        schedule = Schedule(
            section, optimizer, total_steps, steps_per_epoch, checkpoint.monitor, checkpoint.mode, job.trust
        )
        try:
            if schedule.follows_metric and (checkpoint.monitor is None or not evaluates):
                reason = "checkpoint.monitor=null" if evaluates else "the data have no `val`"
                raise ConfigError(
                    f"scheduler._target_={section['_target_']} steps after each evaluation with the value of "
                    f"checkpoint.monitor, but {reason}. Provide it, or choose a schedule that follows steps.",
                    key="scheduler._target_",
                )
            schedule.try_out(_MAX_STEPS, 1.0)
        except LaunchError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{rejection(section, 'scheduler', error)} The check stepped it for a run of "
                f"{total_steps} steps, {steps_per_epoch} per epoch. Leave lengths out, so that it gets the length of "
                "the run."
            ) from error


def sparse_parameters(model: nn.Module) -> dict[int, str]:
    """Return {id: name} of the trained parameters with sparse gradients."""
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    marked = {id(module.weight) for module in tables if module.weight.requires_grad}
    return {id(p): name for name, p in model.named_parameters() if id(p) in marked}


def _refuse_closure(kind: type, target: str) -> None:
    closure = inspect.signature(kind.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer._target_={target} needs a closure that computes the loss several times in one step. The engine "
            "computes each global batch once. Choose an optimizer whose step() takes no closure, such as "
            "torch.optim.AdamW.",
            key="optimizer._target_",
        )


def _refuse_sparse(job: Job, sparse: Mapping[int, str]) -> None:
    """Raise ConfigError if a setting of the job does not support sparse gradients."""
    settings = {
        "trainer.deterministic=true": job.trainer.deterministic,
        f"strategy={job.strategy.name}": not kind_of(job.strategy, job.trust).takes_sparse,
        f"strategy.compression={job.strategy.compression}": job.strategy.compression != "none",
    }
    for name in sparse.values():
        for setting, chosen in settings.items():
            if chosen:
                raise ConfigError(refusal_of_sparse(name, setting))


def _placeholder_groups(
    model: nn.Module, rules: Any, sparse: Mapping[int, str]
) -> tuple[list[dict[str, Any]], dict[nn.Parameter, int]]:
    """Return the groups with placeholders, and the number of elements of the model that each placeholder represents."""
    groups, numels = [], {}
    for group in parameter_groups(model, rules):
        kinds: dict[Any, nn.Parameter] = {}
        for parameter in group["params"]:
            kind = (parameter.ndim, parameter.dtype, id(parameter) in sparse)
            if kind not in kinds:
                shape = [min(side, _SIDE) for side in parameter.shape]
                kinds[kind] = small = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
                small.grad = _sparse_zero(small) if kind[2] else torch.zeros_like(small)
                numels[small] = 0
            numels[kinds[kind]] += parameter.numel()
        groups.append({**group, "params": list(kinds.values())})
    return groups, numels


def _sparse_zero(table: torch.Tensor) -> torch.Tensor:
    """Return a sparse gradient with one row, of zeros."""
    row = torch.zeros(1, *table.shape[1:], dtype=table.dtype)
    return torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), row, table.shape, check_invariants=False)


def _step(optimizer: Optimizer, section: Mapping[str, Any], job: Job) -> None:
    """Step once with zero gradients, some of them sparse.

    Raises:
        ConfigError: the optimizer fails, or has state that a checkpoint cannot store.
    """
    smalls = [p for group in optimizer.param_groups for p in group["params"]]
    has_sparse = any(p.grad is not None and p.grad.is_sparse for p in smalls)
    advice = (
        " The model has an embedding with sparse=True. torch.optim.SGD without momentum and weight decay, "
        "torch.optim.Adagrad, and torch.optim.SparseAdam (if all parameters are such embeddings) support sparse "
        "gradients. Choose one of them, or build the embedding with sparse=False."
    )
    try:
        with preserve_random_states():
            optimizer.step()
    except Exception as error:
        on_gpu = job.scaling.device == "cuda" or torch.cuda.is_available() or job.cluster.of_kind.is_rented
        if on_gpu and not type(optimizer).__module__.startswith("torch."):
            return  # its kernels may exist for GPUs only
        message = rejection(section, "optimizer", error)
        raise ConfigError(f"{message}{advice if has_sparse or 'sparse' in str(error).lower() else ''}") from error
    if any(value.is_sparse for p in smalls for value in _state(optimizer, p)):
        raise ConfigError(
            f"optimizer._target_={section['_target_']} has sparse state with these arguments, which checkpoints "
            f"cannot store.{advice}",
            key="optimizer._target_",
        )


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> Iterable[torch.Tensor]:
    return [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, torch.Tensor)]
