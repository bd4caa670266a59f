"""Preserves the state of a model during calls that are not training steps.

The engine calls the user's model to measure it, to warm up its wrapper, to trace its graph, and for examples.
`preserve_model` ensures that such a call has no effect on training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launcher.engine.randomness import preserve_random_states

_CONTAINERS = (dict, list, set)
_MAX_SHARE = 0.1  # of a GPU's free memory; larger copies are stored on the host, to leave memory for the pass


@contextmanager
def preserve_model(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Restore the model at the end of the context.

    It restores parameters and buffers (values and identity), gradients, `requires_grad`, the mode of every module,
    hooks, plain attributes of modules (numbers, lists, tensors, random generators), and the random states of the
    process. Of other objects that modules refer to, only dictionaries, lists and sets are restored. Inside the context,
    no parameter has a gradient.

    Args:
        device: if it is a GPU, its random state is restored as well.
    """
    modules = [module for module in model.modules() if not _is_lazy(module)]
    parameters = [p for p in model.parameters() if not nn.parameter.is_lazy(p)]
    restore: list[Callable[[], Any]] = [_contents(module.__dict__) for module in modules]
    restore += [_hooks(parameter) for parameter in parameters]
    restore += [undo for module in modules for value in module.__dict__.values() if (undo := _generator(value))]
    plain = [value for module in modules for value in module.__dict__.values() if isinstance(value, Tensor)]
    tensors = [_local(tensor) for tensor in (*parameters, *model.buffers(), *plain) if not _is_computed(tensor)]
    host = _exceeds_gpu_share(tensors)
    copies = [(tensor, tensor.cpu() if host and tensor.is_cuda else tensor.clone()) for tensor in tensors]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    with preserve_random_states(device):
        try:
            yield
        finally:
            for undo in restore:
                undo()
            for tensor, copy in copies:
                if not torch.equal(tensor.to(copy.device), copy):  # NaN is not equal to itself, and is restored
                    tensor.copy_(copy)
            for parameter, trained, grad in flags:
                if parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)
                parameter.grad = grad


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and restore the mode of every module at the end of the context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # The model may override `train`, for example to unmerge LoRA weights.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def _is_lazy(module: nn.Module) -> bool:
    """Whether the first forward pass initialises the module (`nn.LazyLinear`), which is not undone."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(nn.parameter.is_lazy(tensor) for tensor in tensors if tensor is not None)


def _is_computed(tensor: Tensor) -> bool:
    """Whether the tensor is the result of an operation, such as the weight of the deprecated `weight_norm`."""
    return tensor.grad_fn is not None


def _local(tensor: Tensor) -> Tensor:
    """Return the tensor, detached; for a DTensor its local part."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "device_mesh") else part


def _exceeds_gpu_share(tensors: list[Tensor]) -> bool:
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    if not on_gpu:
        return False
    free, _ = torch.cuda.mem_get_info(on_gpu[0].device)
    return sum(tensor.nbytes for tensor in on_gpu) > _MAX_SHARE * free


def _contents(attributes: dict[str, Any]) -> Callable[[], None]:
    """Return a function that restores the attributes of a module, and the contents of containers among them."""
    before = dict(attributes)
    inside = [(value, value.copy()) for value in before.values() if isinstance(value, _CONTAINERS)]

    def undo() -> None:
        attributes.clear()
        attributes.update(before)
        for container, contents in inside:
            if isinstance(container, list):
                container[:] = contents
                continue
            container.clear()  # in place, because the handles of hooks refer to these dictionaries
            container.update(contents)

    return undo


def _hooks(parameter: nn.Parameter) -> Callable[[], None]:
    """Return a function that restores the hooks of a parameter."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    before = {name: dict(getattr(parameter, name) or {}) for name in names}

    def undo() -> None:
        for name, hooks in before.items():
            now = getattr(parameter, name)
            if now is not None and dict(now) != hooks:
                now.clear()
                now.update(hooks)

    return undo


def _generator(value: Any) -> Callable[[], Any] | None:
    """Return a function that restores the state of a random generator, or None for any other object."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return partial(value.set_state, state)
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return partial(value.setstate, numbers)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return partial(setattr, value.bit_generator, "state", bits)
    if isinstance(value, np.random.RandomState):
        old = value.get_state()
        return partial(value.set_state, old)
    return None
