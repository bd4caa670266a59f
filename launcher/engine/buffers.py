"""Merges the buffers of all ranks: running statistics, codebooks, counters.

Each rank updates the buffers of its own copy of the model during training, so they differ between ranks. Evaluation,
checkpoints and exports use merged buffers: running statistics of BatchNorm modules are averaged, all other buffers
are taken from rank 0, as in DistributedDataParallel. A model may specify other rules:

    merge_buffers = {"quantizer.usage": "max", "*.mean": "mean"}     # pattern of names: "mean", "max" or "first"
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.runtime import Runtime
from launcher.engine.tensors import as_real
from launcher.errors import ConfigError, TrainingError, did_you_mean

RULES = ("mean", "max", "first")


class Buffers:
    """The buffers of a model that is replicated on every rank."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._model, self._runtime = model, runtime

    def merge(self) -> None:
        """Replace the buffers of every rank with the merged values. A collective."""
        self.put(self.merged())

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the buffers of the same names. A buffer takes the shape of its new value."""
        own = dict(self._model.named_buffers())
        with torch.no_grad():
            for name in values.keys() & own.keys():
                if own[name].shape == values[name].shape:
                    own[name].copy_(values[name])
                else:
                    own[name].data = values[name].to(own[name].device)

    def copy(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}

    @contextmanager
    def shown(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Replace the buffers of these names with `values` inside the context; yield their original values."""
        own = {name: buffer for name, buffer in self._model.named_buffers() if name in values}
        held = {name: buffer.data for name, buffer in own.items()}
        for name, buffer in own.items():
            buffer.data = values[name]
        try:
            yield held
        finally:
            for name, buffer in own.items():
                buffer.data = held[name]

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Return the merged values of the buffers that differ between ranks. A collective.

        Raises:
            TrainingError: the names of the buffers differ between ranks, or the shapes of a buffer with another rule
                than `first`.
        """
        if self._runtime.alone:
            return {}
        own = {name: buffer.detach() for name, buffer in self._model.named_buffers()}
        everyone = self._runtime.gather({name: _facts(buffer) for name, buffer in own.items()})
        names = [name for name in everyone[0] if any(other.get(name) != everyone[0][name] for other in everyone)]
        missing = sorted({name for other in everyone for name in other.keys() ^ everyone[0].keys()})
        if missing:
            raise TrainingError(
                f'The buffer "{missing[0]}" of the model exists on some ranks only, so the buffers cannot be merged. '
                "Register the same buffers on every rank, in the constructor."
            )
        rules = rules_of(self._model)
        merged = {}
        for name in names:
            rule = rules.get(name, "first")
            layouts = [other[name][:2] for other in everyone]
            if rule == "first":
                merged[name] = self._first(own[name], layouts[0])
                continue
            if any(layout != layouts[0] for layout in layouts):
                raise TrainingError(
                    f'The shape or type of the buffer "{name}" differs between ranks ({_describe(layouts)}), but the '
                    f'rule "{rule}" needs equal ones. Use merge_buffers = {{"{name}": "first"}}, or keep its shape '
                    "constant."
                )
            merged[name] = self._mean(own[name]) if rule == "mean" else self._max(own[name])
        return merged

    def _mean(self, value: Tensor) -> Tensor:
        parts = as_real(value)
        total = self._runtime.add_up(parts.double()) / self._runtime.world_size
        if value.is_complex():
            return torch.view_as_complex(total).to(value.dtype)
        return (total if value.is_floating_point() else total.round()).to(value.dtype)

    def _max(self, value: Tensor) -> Tensor:
        largest = value.double() if value.is_floating_point() else value.long()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._runtime.group_of(largest))
        return largest.to(value.dtype)

    def _first(self, value: Tensor, layout: tuple[tuple[int, ...], str]) -> Tensor:
        """Return rank 0's value. It is broadcast as bytes, which every backend supports."""
        shape, dtype = layout
        sent = value if self._runtime.is_first else value.new_empty(shape, dtype=getattr(torch, dtype))
        sent = sent.clone(memory_format=torch.contiguous_format)
        if sent.numel():
            content = sent.reshape(-1).view(torch.uint8)
            dist.broadcast(content, src=0, group=self._runtime.group_of(content))
        return sent


def rules_of(model: nn.Module) -> dict[str, str]:
    """Return {name: rule} for the buffers whose rule is not the default `first` (the value of rank 0).

    Raises:
        ConfigError: `merge_buffers` of the model has an unknown rule, or a pattern that matches no buffer.
    """
    rules = {
        f"{path}.{name}" if path else name: "mean"
        for path, module in model.named_modules()
        if any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
        for name, buffer in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var") and buffer.is_floating_point()
    }
    own = getattr(model, "merge_buffers", None)
    if own is None:
        return rules
    if not isinstance(own, Mapping):
        raise ConfigError(
            'merge_buffers of the model must map patterns of buffer names to "mean", "max" or "first"; found a '
            f"{type(own).__name__}."
        )
    buffers = dict(model.named_buffers())
    matched: dict[str, str] = {}
    for pattern, rule in own.items():
        if rule not in RULES:
            raise ConfigError(
                f'merge_buffers of the model: "{pattern}" has the unknown rule "{rule}"; use mean, max or first.'
            )
        names = [name for name in buffers if fnmatchcase(name, str(pattern))]
        if not names:
            raise ConfigError(
                f'merge_buffers of the model: no buffer matches "{pattern}".{did_you_mean(str(pattern), buffers)}'
            )
        for name in names:
            if rule == "max" and buffers[name].is_complex():
                raise ConfigError(
                    f'merge_buffers of the model: "{name}" is complex, so the rule max does not apply; use mean or '
                    "first."
                )
            matched.setdefault(name, rule)
    return {**rules, **matched}


def _facts(buffer: Tensor) -> tuple[tuple[int, ...], str, str]:
    """Return the shape, the type and a digest of the bytes of a buffer."""
    content = buffer.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
    dtype = str(buffer.dtype).removeprefix("torch.")
    return tuple(buffer.shape), dtype, hashlib.blake2b(content, digest_size=16).hexdigest()


def _describe(layouts: list[Any]) -> str:
    return ", ".join(f"rank {rank}: {shape} {dtype}" for rank, (shape, dtype) in enumerate(layouts))
