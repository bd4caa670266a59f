"""Collectives for plain Python values, encoded as JSON and raw tensors instead of pickle.

The object collectives of `torch.distributed` unpickle messages, so a malicious peer could execute code. Here a message
is a uint8 tensor:

    8 bytes        length of the head, little-endian
    head           JSON: {"value": the value as `checkpoint.nest` encodes it, "tensors": [[name, dtype, shape], …]}
    tensors        their bytes in that order

The supported values are those of a checkpoint: None, numbers, text, lists, tuples, dictionaries, tensors and numpy
arrays. The caller converts dataclasses.
"""

from __future__ import annotations

import json
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

_HEAD = 8  # bytes of the length of the head


def pack(value: Any) -> torch.Tensor:
    """Encode `value` as a message, uint8 (N,). Raises CheckpointError for a type without encoding."""
    nest, reader = _formats()
    encoder = nest.Encoder()
    encoded = encoder.encode(value, "value")
    table = [[name, reader.DTYPE_NAMES[one.dtype], list(one.shape)] for name, one in encoder.tensors.items()]
    head = json.dumps({"value": encoded, "tensors": table}).encode()
    message = bytearray(len(head).to_bytes(_HEAD, "little") + head)
    for tensor in encoder.tensors.values():
        if tensor.numel():
            message += reader.bytes_of(tensor.detach().cpu().contiguous().resolve_conj().resolve_neg())
    return torch.frombuffer(message, dtype=torch.uint8)


def unpack(message: torch.Tensor) -> Any:
    """Decode a message without executing any of its content. Raises ValueError for an invalid message."""
    nest, reader = _formats()
    data = message.numpy()
    start = _HEAD + int.from_bytes(data[:_HEAD].tobytes(), "little")
    try:
        head = json.loads(data[_HEAD:start].tobytes())
        table = head["tensors"]
        infos = {
            name: nest.TensorInfo(name, reader.DTYPES[dtype], tuple(map(int, shape))) for name, dtype, shape in table
        }
        sizes = [math.prod(info.shape) * info.dtype.itemsize for info in infos.values()]
        if any(n < 0 for info in infos.values() for n in info.shape) or start + sum(sizes) != len(data):
            raise ValueError("the sizes of the tensors do not match the message")
        binder = nest.Binder()
        value = binder.bind(nest.decode(head["value"], infos), None)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"a rank sent an invalid message: {error}") from error
    places: dict[str, list[torch.Tensor]] = {}
    for info, place in binder.reads:
        places.setdefault(info.name, []).append(place)
    for (name, info), size in zip(infos.items(), sizes, strict=True):
        if size:
            stored = message[start : start + size].clone().view(info.dtype).reshape(info.shape)
            for place in places.get(name, []):
                place.copy_(stored)
        start += size
    return value


def all_gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the value of every rank of `group`, a group for CPU tensors, by rank."""
    message = pack(value)
    sizes = _sizes(message, group)
    messages = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(messages, _padded(message, max(sizes)), group=group)
    return [unpack(one[:size]) for one, size in zip(messages, sizes, strict=True)]


def gather(value: Any, group: dist.ProcessGroup) -> list[Any] | None:
    """Return the value of every rank of `group`, a group for CPU tensors, on its first rank; None on the others."""
    message = pack(value)
    sizes = _sizes(message, group)
    messages = None if dist.get_rank(group) else [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
    dist.gather(_padded(message, max(sizes)), messages, dist.get_global_rank(group, 0), group=group)
    if messages is None:
        return None
    return [unpack(one[:size]) for one, size in zip(messages, sizes, strict=True)]


def broadcast(value: Any, group: dist.ProcessGroup) -> Any:
    """Return the value of the first rank of `group`, a group for CPU tensors; the values of others are ignored."""
    first = dist.get_rank(group) == 0
    source = dist.get_global_rank(group, 0)
    message = pack(value) if first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([message.numel()])
    dist.broadcast(size, source, group=group)
    if not first:
        message = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, source, group=group)
    return unpack(message)


def _formats() -> tuple[ModuleType, ModuleType]:
    """Return the modules `nest` and `reader` of checkpoints, whose import takes half a second (DTensor, SymPy)."""
    from launcher.engine.checkpoint import nest, reader

    return nest, reader


def _sizes(message: torch.Tensor, group: dist.ProcessGroup) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([message.numel()]), group=group)
    return [int(size) for size in sizes]


def _padded(message: torch.Tensor, length: int) -> torch.Tensor:
    padded = torch.zeros(length, dtype=torch.uint8)
    padded[: message.numel()] = message
    return padded
