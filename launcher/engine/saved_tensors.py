"""Measures the memory of the tensors that autograd saves for the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


class SavedTensorBytes:
    """Counts the bytes of the storages that autograd saves, each once, without the parameters of the network.

    Attributes:
        total: bytes saved by the forward passes inside `recording()`.
        largest: bytes of the largest storage.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._saved: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._saved.values())

    @property
    def largest(self) -> int:
        return max(self._saved.values(), default=0)

    def recording(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor)

    def _record(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor
