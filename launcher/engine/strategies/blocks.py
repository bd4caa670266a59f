"""Blocks of a network: the modules that repeat, such as the layers of a Transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.errors import ConfigError, did_you_mean


def blocks_of(model: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """Return the outermost blocks of a network, in order.

    Args:
        names: class names of the blocks. If empty, the blocks are the members of every ModuleList and Sequential that
            have parameters and whose class occurs there at least twice.

    Raises:
        ConfigError: no module has a class of that name.
    """
    if names:
        classes = {type(module).__name__ for module in model.modules()}
        for name in names:
            if name not in classes:
                raise ConfigError(
                    f"strategy.blocks names {name}, but no module of the network has that class. The classes are "
                    f"{', '.join(sorted(classes))}.{did_you_mean(name, sorted(classes))}",
                    key="strategy.blocks",
                )
        return _outermost(model, [module for module in model.modules() if type(module).__name__ in names])
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            members = [member for member in module if any(True for _ in member.parameters())]
            kinds = Counter(type(member) for member in members)
            found += [member for member in members if kinds[type(member)] > 1]
    return _outermost(model, found)


def check_divisible(model: nn.Module, names: Sequence[str] = ()) -> None:
    """Raise ConfigError if FSDP cannot shard the parameters of the network."""
    named = list(model.named_parameters())
    blocks = blocks_of(model, names)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    groups = [list(block.parameters()) for block in blocks]
    groups.append([parameter for _, parameter in named if id(parameter) not in inside])
    name_of = {id(parameter): name for name, parameter in named}
    problem = next((f'"{name}" is a single number' for name, parameter in named if parameter.ndim == 0), None)
    problem = problem or next((f'"{name}" is complex' for name, p in named if p.is_complex()), None)
    for group in groups:
        trained = {p.dtype: name_of[id(p)] for p in group if p.requires_grad}
        if len(trained) > 1:
            found = ", ".join(f'"{name}" {str(dtype).removeprefix("torch.")}' for dtype, name in trained.items())
            problem = problem or f"parameters of one block have different dtypes ({found})"
    if problem is not None:
        raise ConfigError(
            f"strategy=fsdp shards every parameter, and in this network {problem}, which FSDP does not support. Use "
            "strategy=ddp, or change the parameter (a single number can have the shape (1,))."
        )


def _outermost(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    ids, inner = {id(module) for module in chosen}, set()
    ordered = [module for module in model.modules() if id(module) in ids and module is not model]
    for module in ordered:
        inner |= {id(below) for below in module.modules() if below is not module}
    return [module for module in ordered if id(module) not in inner]


def recompute(model: nn.Module, names: Sequence[str] = ()) -> None:
    """Enable activation checkpointing: the blocks recompute their activations in the backward pass.

    Random layers draw the same numbers again. Parameter names do not change.

    Raises:
        ConfigError: no blocks were found in the network.
    """
    blocks = blocks_of(model, names)
    if not blocks:
        raise ConfigError(
            "strategy.activation_checkpointing=true recomputes the blocks of the network, but no blocks were found "
            "(modules of one class in an nn.ModuleList or nn.Sequential). Name their classes in "
            "strategy.blocks=[NAME], or remove the option.",
            key="strategy.activation_checkpointing",
        )
    for block in blocks:
        if getattr(block.forward, "func", None) is checkpoint:
            continue  # already wrapped
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
