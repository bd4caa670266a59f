"""Batches, whatever the data set makes them of: mappings, sequences and tensors; on the device and in its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def tree_map(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Apply `function` to every tensor of a batch made of mappings, sequences and tensors."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: tree_map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(tree_map(function, value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(tree_map(function, value) for value in batch)
    return batch


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch on `device`. From pageable memory to a GPU it passes through pinned memory, to copy at once."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return tree_map(one, batch)


def channels_last(batch: Any) -> Any:
    """Return the batch with its pictures (floating, 4-D) in channels-last memory, which convolutions read faster."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        picture = tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if picture else tensor

    return tree_map(one, batch)


def record_stream(batch: Any, stream: torch.cuda.Stream) -> None:
    """Have the allocator keep the memory of a batch on a GPU until `stream` has passed this point."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            tensor.record_stream(stream)
        return tensor

    tree_map(one, batch)
