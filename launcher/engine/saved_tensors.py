"""How much memory autograd keeps between a forward pass and its backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


class SavedTensorBytes:
    """Counts the storages that autograd keeps, each once and the network's own parameters not at all.

    Attributes:
        total: bytes kept by the forward passes inside `counted()`; largest: those of the largest storage.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._kept.values())

    @property
    def largest(self) -> int:
        return max(self._kept.values(), default=0)

    def recording(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor
