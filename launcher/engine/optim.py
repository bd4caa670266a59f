"""Builds the optimizer with its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import targets
from launcher.engine.construct import construct

# `conf/scheduler/cosine.yaml` and the configuration of existing runs name it as a part of this module.
from launcher.engine.warmup_schedules import WarmupCosine as WarmupCosine
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
    pattern of parameter names, the first match wins, and the other parameters use the settings of the section.

    Args:
        may_fuse: must be false if a parameter may get its first gradient later than others, because fused SGD with
            momentum fails then.
        may_change: whether frozen parameters may be trained later, so that empty groups are needed for them.

    Raises:
        ConfigError: a pattern matches no parameter, or all parameters are frozen.
    """
    kind = targets.resolve(section["_target_"], "optimizer", trust)
    groups = parameter_groups(model, section.get("groups") or [], may_change)
    parameters = inspect.signature(kind).parameters
    extra: dict[str, Any] = {}
    # One kernel for all parameters instead of one per parameter, also on the CPU.
    if may_fuse and "fused" in parameters and "fused" not in section and _can_fuse(model, kind):
        extra["fused"] = True
    return construct(section, "optimizer", trust, params=groups, **extra)


def _can_fuse(model: nn.Module, kind: Any) -> bool:
    if any(hasattr(p, "device_mesh") for p in model.parameters()) and kind.__name__ not in ("Adam", "AdamW"):
        return False  # only these fused kernels support sharded parameters (torch 2.13)
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters())


def destinations(model: nn.Module, rules: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each parameter the number of its group when it is trained.

    n is the group of the n-th rule; 0 is the group of parameters that no rule, or a freezing rule, matches.
    """
    numbers = [_rule_of(name, rules) for name, _ in model.named_parameters()]
    return [0 if number is None or rules[number].get("freeze") else number + 1 for number in numbers]


def _rule_of(name: str, rules: Sequence[Mapping[str, Any]]) -> int | None:
    return next((i for i, rule in enumerate(rules) if fnmatchcase(name, str(rule.get("match")))), None)


def parameter_groups(
    model: nn.Module, rules: Sequence[Mapping[str, Any]], may_change: bool = False
) -> list[dict[str, Any]]:
    """Freeze and group the model's parameters by the rules; see `build_optimizer`. Return the groups."""
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
                "Each entry of optimizer.groups needs the key `match`, a pattern of parameter names; found "
                f"{dict(rule)}.",
                key="optimizer.groups",
            )
        if not hit:
            raise ConfigError(
                f'optimizer.groups: no remaining parameter matches the pattern "{rule["match"]}". '
                f"The model has {len(names)} parameters, such as "
                f"{', '.join(names[:3])}.{did_you_mean(str(rule['match']), names)}",
                key="optimizer.groups",
            )
    overrides = [{}, *({key: rule[key] for key in rule if key not in ("match", "freeze")} for rule in rules)]
    groups = [
        {"params": parameters, **own}
        for number, (parameters, own) in enumerate(zip(members, overrides, strict=True))
        if parameters or (may_change and number in numbers)
    ]
    if not any(members):
        raise ConfigError(
            "There is nothing to train: all parameters are frozen by optimizer.groups or by the model itself. "
            "Unfreeze some.",
            key="optimizer.groups",
        )
    return groups


def learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of the first group that has parameters."""
    groups = optimizer.param_groups
    return rate_of(next((group for group in groups if group["params"]), groups[0]))


def rate_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a parameter group."""
    rate = group["lr"]
    return float(rate.item() if isinstance(rate, torch.Tensor) else rate)
