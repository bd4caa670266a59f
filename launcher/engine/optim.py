"""The optimizer with its parameter groups, and a schedule of our own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from launcher.config import targets
from launcher.engine.construct import construct
from launcher.errors import ConfigError, did_you_mean


def build_optimizer(
    section: Mapping[str, Any],
    model: nn.Module,
    trust: Sequence[str] = (),
    may_fuse: bool = True,
    may_change: bool = False,
) -> Optimizer:
    """Build the optimizer of the configuration over the model's parameters.

    `groups` is a list of `{match: PATTERN, …overrides}` or `{match: PATTERN, freeze: true}`; a pattern is a shell-style
    pattern over parameter names, the first that matches wins, and the rest take the optimizer's own settings.

    Args:
        may_fuse: false where a parameter may have its first gradient later than others: fused SGD with momentum fails.
        may_change: whether frozen parameters may be trained later: groups that have no others are there, empty.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    kind = targets.resolve(section["_target_"], "optimizer", trust)
    groups = parameter_groups(model, section.get("groups") or [], may_change)
    parameters = inspect.signature(kind).parameters
    extra: dict[str, Any] = {}
    # One kernel for all parameters instead of one for each; on the CPU too.
    if may_fuse and "fused" in parameters and "fused" not in section and _can_fuse(model, kind):
        extra["fused"] = True
    return construct(section, "optimizer", trust, params=groups, **extra)


def _can_fuse(model: nn.Module, kind: Any) -> bool:
    if any(hasattr(p, "device_mesh") for p in model.parameters()) and kind.__name__ not in ("Adam", "AdamW"):
        return False  # of the fused kernels these alone take parameters that are divided among the workers (torch 2.13)
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters())


def destinations(model: nn.Module, rules: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each parameter the number of the group that it belongs to when it is trained.

    0 is the group of those that no rule matches, or one that freezes; n is that of the n-th rule.
    """
    numbers = [_rule_of(name, rules) for name, _ in model.named_parameters()]
    return [0 if number is None or rules[number].get("freeze") else number + 1 for number in numbers]


def _rule_of(name: str, rules: Sequence[Mapping[str, Any]]) -> int | None:
    return next((i for i, rule in enumerate(rules) if fnmatchcase(name, str(rule.get("match")))), None)


def parameter_groups(
    model: nn.Module, rules: Sequence[Mapping[str, Any]], may_change: bool = False
) -> list[dict[str, Any]]:
    """Freeze and group the model's parameters by the rules; see `build_optimizer`. Frozen ones need no gradient."""
    names = [name for name, _ in model.named_parameters()]
    matched = [False] * len(rules)
    for name, parameter in model.named_parameters():
        index = _rule_of(name, rules)
        if index is not None:
            matched[index] = True
            if rules[index].get("freeze"):
                parameter.requires_grad_(False)
    members: list[list[nn.Parameter]] = [[] for _ in range(len(rules) + 1)]
    numbers = destinations(model, rules)
    for parameter, number in zip(model.parameters(), numbers, strict=True):
        if parameter.requires_grad:
            members[number].append(parameter)
    for rule, hit in zip(rules, matched, strict=True):
        if "match" not in rule:
            raise ConfigError(
                f"Each entry of optimizer.groups needs `match`, a pattern of parameter names; found {dict(rule)}."
            )
        if not hit:
            raise ConfigError(
                f'optimizer.groups: no parameter is left for the pattern "{rule["match"]}". '
                f"The model has {len(names)} parameters, such as "
                f"{', '.join(names[:3])}.{did_you_mean(str(rule['match']), names)}"
            )
    overrides = [{}, *({key: rule[key] for key in rule if key not in ("match", "freeze")} for rule in rules)]
    groups = [
        {"params": parameters, **own}
        for number, (parameters, own) in enumerate(zip(members, overrides, strict=True))
        if parameters or (may_change and number in numbers)
    ]
    if not any(members):
        raise ConfigError(
            "Nothing is left to train: every parameter is frozen by optimizer.groups or by the model itself."
        )
    return groups


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to `min_ratio` times the learning rate (Loshchilov & Hutter 2017).

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_ratio: part of the run, 0 to 1, in which the rate rises linearly to the learning rate.
        warmup_steps: the same as a number of steps, which then counts instead.
        min_ratio: what is left of the learning rate at the end, 0 to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        if not 0 <= warmup_ratio <= 1:
            raise ConfigError(f"scheduler.warmup_ratio={warmup_ratio}: it is a part of the run, between 0 and 1.")
        if warmup_steps is None:
            warmup_steps = round(warmup_ratio * total_steps)
        if not 0 <= warmup_steps <= total_steps:
            raise ConfigError(
                f"scheduler.warmup_steps={warmup_steps}: it must lie between 0 and the run's {total_steps} steps."
            )

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        super().__init__(optimizer, ratio)


def learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of the first group that trains something."""
    groups = optimizer.param_groups
    rate = next((group for group in groups if group["params"]), groups[0])["lr"]
    return float(rate.item() if isinstance(rate, torch.Tensor) else rate)
