"""Storage reader for torch.distributed.checkpoint (DCP) with a format of raw bytes and JSON instead of pickle.

DCP plans which rank writes and reads which part of each tensor, so that n ranks can save a state and m ranks can load
it. DCP's own storage unpickles `.metadata`, which can execute code; this one replaces it. `metadata.json`:

    {"format": 1, "byteorder": "little", "tensors": {name: {"dtype": "float32", "shape": […], "chunks": [
        {"offsets": […], "sizes": […], "file": "data-00000.bin", "start": byte} …]}}}

The metadata is validated before memory is allocated: chunks are within their file, do not overlap, and have the volume
of their tensor in total. So a checkpoint never requires more memory than its files have bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from launcher.engine.checkpoint import files
from launcher.engine.checkpoint.nest import TensorInfo
from launcher.errors import CheckpointError

_ALL = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _ALL.split() if hasattr(torch, name)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_DIMENSIONS = 64


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # of one element, which counts as contiguous for any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the metadata describes it."""

    info: TensorInfo
    chunks: list[Chunk]


def read_table(path: Path, entries: Mapping[str, files.FileEntry]) -> dict[str, StoredTensor]:
    """Return name -> stored tensor, read from `metadata.json` and validated.

    Raises:
        CheckpointError: the metadata is invalid; the message names the file and the tensor.
    """
    file = path / files.METADATA
    content = files.read_json(file, entries[files.METADATA].size)
    if (
        not isinstance(content, dict)
        or content.get("format") != files.FORMAT
        or not isinstance(content.get("tensors"), dict)
    ):
        raise CheckpointError(f"{file} is not the metadata of a checkpoint of format {files.FORMAT}.")
    if content.get("byteorder") != sys.byteorder:
        raise CheckpointError(f"{file}: the checkpoint was written on a machine with a different byte order.")
    table, extents = {}, []
    for name, described in content["tensors"].items():
        try:
            table[name] = stored = _stored(name, described, entries)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged or forged: tensor {name!r}: {error}.") from error
        for chunk in stored.chunks:
            if nbytes := math.prod(chunk.sizes) * stored.info.dtype.itemsize:
                extents.append((chunk.file, chunk.start, chunk.start + nbytes))
    extents.sort()
    for (one, _, end), (other, start, _) in itertools.pairwise(extents):
        if one == other and start < end:
            raise CheckpointError(f"{file} is damaged or forged: two tensors share bytes {start} to {end} of {one}.")
    return table


def _stored(name: str, described: Any, entries: Mapping[str, files.FileEntry]) -> StoredTensor:
    dtype, shape = DTYPES[described["dtype"]], _sizes(described["shape"])
    chunks = [
        Chunk(_sizes(chunk["offsets"]), _sizes(chunk["sizes"]), chunk["file"], *_sizes([chunk["start"]]))
        for chunk in described["chunks"]
    ]
    for chunk in chunks:
        if not (len(chunk.offsets) == len(chunk.sizes) == len(shape)):
            raise ValueError("a chunk with a different number of dimensions")
        if any(offset + size > limit for offset, size, limit in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise ValueError("a chunk outside of the tensor")
        entry = entries.get(chunk.file) if chunk.file != files.STATE and chunk.file != files.METADATA else None
        if entry is None:
            raise ValueError(f"a file {chunk.file!r} that the manifest does not list")
        if chunk.start + math.prod(chunk.sizes) * dtype.itemsize > entry.size:
            raise ValueError(f"bytes beyond the end of {chunk.file}, which has {entry.size}")
    # Because extents in the files do not overlap, this also limits the memory that loading allocates.
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"chunks that do not cover its shape {shape}")
    return StoredTensor(TensorInfo(name, dtype, shape), chunks)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError("a size that is not a list of numbers")
    if any(type(value) is not int or not 0 <= value < 2**62 for value in values):
        raise ValueError(f"an invalid size or offset: {str(values)[:80]}")
    if math.prod(max(value, 1) for value in values) >= 2**62:  # torch rejects it for an empty tensor too
        raise ValueError(f"an invalid size: {str(values)[:80]}")
    return tuple(values)


class CheckpointReader(StorageReader):
    """Reads tensors of one checkpoint for DCP.

    Args:
        requested: key in DCP's state dict -> stored tensor. A stored tensor may have several keys.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, files.FileEntry], requested: Mapping[str, StoredTensor]
    ) -> None:
        self.path, self.entries, self.requested = path, entries, requested
        self.chunks = {(key, chunk.offsets): chunk for key, stored in requested.items() for chunk in stored.chunks}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=stored.info.dtype),
                    torch.Size(stored.info.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in stored.chunks
                    ],
                )
                for key, stored in self.requested.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise CheckpointError(f"{self.path} has an entry that is not a tensor where a tensor is expected.")
            chunk = self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            per_file.setdefault(chunk.file, []).append((chunk, item))
        with torch.no_grad():
            for name, items in per_file.items():
                with files.open_regular(self.path / name, self.entries[name].size) as stream:
                    for chunk, item in sorted(items, key=lambda pair: pair[0].start):
                        target = planner.resolve_tensor(item).detach()
                        self._read(stream, chunk, item, target)
                        planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, stream: BinaryIO, chunk: Chunk, item: ReadItem, target: Tensor) -> None:
        """Read the box `item` of `chunk` into `target`.

        Only the rows of the box are read, directly into `target` if its layout allows it.
        """
        dtype = self.requested[item.storage_index.fqn].info.dtype
        shape, start = list(chunk.sizes), chunk.start
        if shape:
            start += item.storage_offsets[0] * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = item.lengths[0]
        direct = target.is_cpu and target.is_contiguous() and list(target.shape) == shape and target.dtype == dtype
        rows = target if direct else torch.empty(shape, dtype=dtype)
        if rows.numel():
            buffer, done = bytes_of(rows), 0
            stream.seek(start)
            while done < len(buffer):
                count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{self.path / chunk.file} is truncated.")
                done += count
        if not direct:
            for dimension in range(1, len(shape)):
                rows = rows.narrow(dimension, item.storage_offsets[dimension], item.lengths[dimension])
            target.copy_(rows)
