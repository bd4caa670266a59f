"""Save and load the state of a model and its optimizer by parameter name.

Names are those of the plain module, without the prefixes of DistributedDataParallel, torch.compile and activation
checkpointing, so that a checkpoint does not depend on how the model was run.

torch.distributed.checkpoint.state_dict is not used: to initialize the state of an optimizer it takes a step with zero
gradients, after which Adam has a step count of 1 and SGD a momentum of 0. A new optimizer has neither, so a run resumed
from step 0 would differ from an uninterrupted run.
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
    """Return the user's module, without the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return name -> parameter or buffer, not copied; DTensors if sharded. Tied weights appear under each name."""
    return {_plain(name): value for name, value in unwrap(model).state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the result of `model_state` into the model. The names must be equal."""
    target = unwrap(model)
    names = {_plain(name): name for name in target.state_dict()}
    target.load_state_dict({names.get(name, name): value for name, value in state.items()})


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state_dict with parameter names instead of indices. Tensors are not copied."""
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()
    flat = [name for group in names for name in group]
    groups = [{**group, "params": own} for group, own in zip(state["param_groups"], names, strict=True)]
    return {**state, "state": {flat[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the result of `optimizer_state` into the optimizer, bit for bit. Its tensors are used, not copied.

    Raises:
        CheckpointError: a group has other parameters than the saved group; their order may differ.
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
    """Return the nest to load an optimizer's state into: new tensors that are sharded like their parameters.

    Only the parameters of the optimizer and the tensors in its groups are used, so it may be new.

    Args:
        saved: the section `optimizer` in the result of `inspect`.
    """
    names = _parameter_names(model, optimizer)
    _compare_groups(names, [group["params"] for group in saved["param_groups"]])
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip((name for group in names for name in group), flat, strict=True))
    groups = []
    for stored, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        groups.append(
            {key: _like(live.get(key)) if isinstance(value, TensorInfo) else value for key, value in stored.items()}
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
    """Load a checkpoint into a model and its optimizer, in place, and return the content of the checkpoint.

    Args:
        verified, rank: see `load`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit the model and optimizer.
    """
    into = {"model": model_state(model), "optimizer": lambda saved: optimizer_template(model, optimizer, saved)}
    content = load(path, into, verified=verified, rank=rank)
    for section in into:
        if section not in content.state:
            raise CheckpointError(
                f"The checkpoint {path} has no section {section!r}, so training cannot resume from it. Load its "
                "weights with checkpoint.load."
            )
    load_model_state(model, content.state["model"])
    load_optimizer_state(model, optimizer, content.state["optimizer"])
    return content


def sharded_like(own: Any, value: Tensor) -> Tensor:
    """Return `value`, or this worker's shard of it if the destination `own` is a DTensor."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group; parameters outside of the model are `#group.index`."""
    known = {id(parameter): _plain(name) for name, parameter in unwrap(model).named_parameters()}
    return [
        [known.get(id(parameter), f"#{number}.{index}") for index, parameter in enumerate(group["params"])]
        for number, group in enumerate(optimizer.param_groups)
    ]


def _compare_groups(current: list[list[str]], saved: list[list[str]]) -> None:
    if len(current) != len(saved):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(saved)} groups of parameters and this one has {len(current)}. Use "
            "the optimizer.groups that it was saved with."
        )
    for index, (own, other) in enumerate(zip(current, saved, strict=True)):
        if difference := sorted(set(own) ^ set(other)):
            raise CheckpointError(
                f"Group {index} of the checkpoint's optimizer and of this one differ in {', '.join(difference[:5])}"
                f"{' and more' if len(difference) > 5 else ''}. Use the model and the optimizer.groups that it was "
                "saved with."
            )


def _empty(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, TensorInfo):
        # With the memory layout of the parameter: fused kernels access both by address, regardless of strides.
        if value.shape == tuple(parameter.shape) and (value.shape or isinstance(parameter, DTensor)):
            return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        # load_state_dict moves 0-dimensional counters to the CPU or the device, by the rules of torch.
        return torch.empty(value.shape, dtype=value.dtype, device=parameter.device if value.shape else "cpu")
    if isinstance(value, Mapping):
        return {key: _empty(item, parameter) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_empty(item, parameter) for item in value)
    return value


def _unconverted(value: Any, live: Any) -> Any:
    """Return `live` with those tensors of `value` whose dtypes differ, on the devices of `live`."""
    if isinstance(value, Tensor) and isinstance(live, Tensor):
        return live if live.dtype == value.dtype else value.to(live.device)
    if isinstance(value, dict) and isinstance(live, dict):
        return {key: _unconverted(value[key], item) if key in value else item for key, item in live.items()}
    if isinstance(value, list | tuple) and isinstance(live, list | tuple) and len(value) == len(live):
        return type(live)(_unconverted(*pair) for pair in zip(value, live, strict=True))
    return live


def _like(tensor: Any) -> Tensor | None:
    return torch.empty_like(tensor) if isinstance(tensor, Tensor) else None
