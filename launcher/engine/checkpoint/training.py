"""The state of a model and its optimizer by the names of parameters, and back.

Names are those of the plain module: what DistributedDataParallel, torch.compile and activation checkpointing put in
front is taken away, so that a checkpoint does not depend on how the model was run. Of
torch.distributed.checkpoint.state_dict we use nothing: to know an optimizer's state it takes a step with zero
gradients, which leaves Adam's step count at 1 and SGD's momentum at 0 where a fresh optimizer has neither, so that a
run resumed from step 0 would differ from one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launcher.engine.checkpoint.loading import Content, load
from launcher.engine.checkpoint.nest import TensorInfo
from launcher.errors import CheckpointError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module below DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return name -> parameter or buffer (DTensors where it is sharded), not copied; tied weights under each of their
    names.
    """
    return {_plain(name): value for name, value in unwrap(model).state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put what `model_state` gave back into the model, strictly."""
    target = unwrap(model)
    names = {_plain(name): name for name in target.state_dict()}
    target.load_state_dict({names.get(name, name): value for name, value in state.items()})


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state_dict with names of parameters in the place of numbers; tensors are not copied."""
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()
    flat = [name for group in names for name in group]
    groups = [{**group, "params": own} for group, own in zip(state["param_groups"], names, strict=True)]
    return {**state, "state": {flat[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put what `optimizer_state` gave back into the optimizer, fresh or used, bit for bit; its tensors are taken, not
    copied.

    Groups must hold the same parameters, in any order; CheckpointError names the group otherwise.
    """
    names = _parameter_names(model, optimizer)
    _compare_groups(names, [group["params"] for group in saved["param_groups"]])
    number = {name: index for index, name in enumerate(name for group in names for name in group)}
    groups = [
        {**group, "params": [number[name] for name in own]}
        for group, own in zip(saved["param_groups"], names, strict=True)
    ]
    state = {number[name]: value for name, value in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    # torch converts floating point state to the parameter's dtype, which rounds float32 state of bfloat16 parameters.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, value in state.items():
        optimizer.state[parameters[index]] = _unconverted(value, optimizer.state[parameters[index]])


def optimizer_template(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nest to load `saved` (the optimizer's section of `inspect`) into: new tensors, sharded as their
    parameters are.

    The optimizer itself is neither read nor changed but for its parameters and the tensors in its groups, so it may be
    fresh.
    """
    names = _parameter_names(model, optimizer)
    _compare_groups(names, [group["params"] for group in saved["param_groups"]])
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip((name for group in names for name in group), flat, strict=True))
    groups = []
    for kept, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        groups.append(
            {key: _like(live.get(key)) if isinstance(value, TensorInfo) else value for key, value in kept.items()}
        )
    state = {name: _empty(values, parameters[name]) for name, values in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the sections `model` and `optimizer` for `Checkpointer.save`."""
    return {"model": model_state(model), "optimizer": optimizer_state(model, optimizer)}


def restore_training(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    verified: bool = False,
    rank: tuple[int, int] | None = None,
) -> Content:
    """Load the sections `model` and `optimizer` of the checkpoint at `path` into both, in place; return its whole
    content. `rank`: see `load`.
    """
    into = {"model": model_state(model), "optimizer": lambda saved: optimizer_template(model, optimizer, saved)}
    content = load(path, into, verified=verified, rank=rank)
    for section in into:
        if section not in content.state:
            raise CheckpointError(f"The checkpoint {path} has no section {section!r}; it was not saved by training.")
    load_model_state(model, content.state["model"])
    load_optimizer_state(model, optimizer, content.state["optimizer"])
    return content


def sharded_like(own: Any, value: Tensor) -> Tensor:
    """Return `value`, or this worker's part of it where `own`, the tensor that it goes into, is divided."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the optimizer's parameters, group by group; those outside of the model are called
    `#group.index`.
    """
    known = {id(parameter): _plain(name) for name, parameter in unwrap(model).named_parameters()}
    return [
        [known.get(id(parameter), f"#{number}.{index}") for index, parameter in enumerate(group["params"])]
        for number, group in enumerate(optimizer.param_groups)
    ]


def _compare_groups(here: list[list[str]], saved: list[list[str]]) -> None:
    if len(here) != len(saved):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(saved)} groups of parameters and this one has {len(here)}. Use the "
            "optimizer.groups that it was saved with."
        )
    for index, (own, other) in enumerate(zip(here, saved, strict=True)):
        if difference := sorted(set(own) ^ set(other)):
            raise CheckpointError(
                f"Group {index} of the checkpoint's optimizer and of this one differ in {', '.join(difference[:5])}"
                f"{' and more' if len(difference) > 5 else ''}. Use the model and the optimizer.groups that it was "
                "saved with."
            )


def _empty(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, TensorInfo):
        # In the parameter's own memory layout: fused kernels walk through both by address, whatever their strides say.
        if value.shape == tuple(parameter.shape) and (value.shape or isinstance(parameter, DTensor)):
            return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        # Counters (0-dimensional) belong on the CPU or the device by rules of torch's own, which load_state_dict
        # applies.
        return torch.empty(value.shape, dtype=value.dtype, device=parameter.device if value.shape else "cpu")
    if isinstance(value, Mapping):
        return {key: _empty(item, parameter) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_empty(item, parameter) for item in value)
    return value


def _unconverted(value: Any, live: Any) -> Any:
    """Return `live` with the tensors of `value`, on the devices of `live`, wherever their dtypes differ."""
    if isinstance(value, Tensor) and isinstance(live, Tensor):
        return live if live.dtype == value.dtype else value.to(live.device)
    if isinstance(value, dict) and isinstance(live, dict):
        return {key: _unconverted(value[key], item) if key in value else item for key, item in live.items()}
    if isinstance(value, list | tuple) and isinstance(live, list | tuple) and len(value) == len(live):
        return type(live)(_unconverted(*pair) for pair in zip(value, live, strict=True))
    return live


def _like(tensor: Any) -> Tensor | None:
    return torch.empty_like(tensor) if isinstance(tensor, Tensor) else None
