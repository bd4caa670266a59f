"""Planner and storage writer for torch.distributed.checkpoint (DCP). `reader` describes the format of the files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from launcher.engine.checkpoint import files
from launcher.engine.checkpoint.reader import DTYPE_NAMES, bytes_of
from launcher.errors import CheckpointError
from launcher.formatting import size


@dataclass(frozen=True)
class ChunkLocation:
    """The position of a chunk: file and first byte. `size` and `checksum` are those of the file, for the manifest."""

    file: str
    start: int
    size: int = 0
    checksum: str = ""


@dataclass(frozen=True)
class Part:
    """The part of a tensor that this rank can write: its chunk, and the tensor that has the values."""

    item: WriteItem
    source: Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank saves its shard of a tensor."""
    return isinstance(tensor, DTensor)


def part_of(name: str, tensor: Tensor) -> Part | None:
    """Return this rank's part of `tensor`: all of a plain tensor, the local shard of a DTensor, None if it is empty.

    Raises:
        CheckpointError: a checkpoint does not support the dtype.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name} has dtype {tensor.dtype}, which a checkpoint does not support. Convert it in state_dict()."
        )
    kind, local = WriteItemType.TENSOR, tensor.detach()
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    if isinstance(tensor, DTensor):
        if tensor.device_mesh.get_coordinate() is None:
            return None
        kind, local = WriteItemType.SHARD, tensor.to_local().detach()
        (chunk,) = tensor.__create_chunk_list__()
        if local.numel() == 0 and tensor.numel() > 0:
            return None
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.size())
    return Part(WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=data), local)


class Planner(DefaultSavePlanner):
    """Plans which rank writes which of the `parts`.

    The plan also sends `own`, the JSON of the state of this rank alone, to the coordinator.
    """

    def __init__(self, parts: list[Part], own: Any) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = {part.item.index: part for part in parts}
        self.own = own

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([part.item for part in self.parts.values()], planner_data=self.own)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        own = [plan.planner_data for plan in all_plans]
        plans, metadata = super().create_global_plan(
            [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        )
        return plans, dataclasses.replace(metadata, planner_data=own)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.parts[write_item.index].source


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint: each rank its data file, the coordinator all other files.

    The manifest is written last, then the directory is renamed to its final name.

    Args:
        shared: JSON of the state that all ranks share; used by the coordinator.
        scattered: each machine has a separate directory, and uploads its files to an object store.
    """

    def __init__(self, directory: Path, step: int, shared: Any, scattered: bool = False) -> None:
        self.directory, self.step, self.shared = directory, step, shared
        self.scattered = scattered
        self.temporary: Path | None = None  # chosen by the coordinator; other ranks receive it with the plan
        self.nbytes = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.nbytes = sum(_nbytes(item) for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.directory).free
        if free < self.nbytes:
            raise CheckpointError(f"no space left: it needs {size(self.nbytes)}, and {size(free)} are free")
        self.temporary = self.directory / files.new_name(self.step, "tmp")
        self.temporary.mkdir()
        names = [f"{self.temporary.name}/{files.data_file(rank)}" for rank in range(len(plans))]
        return [dataclasses.replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        file = self.directory / plan.storage_data
        starts: list[int] = []
        if self.scattered:
            file.parent.mkdir(exist_ok=True)
        self.temporary = file.parent

        def blocks() -> Iterator[memoryview]:
            position = 0
            for item in plan.items:
                source = planner.resolve_data(item)
                block = bytes_of(source.cpu().contiguous().resolve_conj().resolve_neg())  # type: ignore[union-attr]
                starts.append(position)
                position += len(block)
                yield block

        results = []
        if plan.items:
            with _disk_errors(file.parent.parent):
                entry = files.write_file(file, blocks())
            results = [
                WriteResult(item.index, _nbytes(item), ChunkLocation(file.name, start, entry.size, entry.checksum))
                for item, start in zip(plan.items, starts, strict=True)
            ]
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.temporary is not None
        places: dict[MetadataIndex, ChunkLocation] = {
            result.index: result.storage_data for part in results for result in part
        }
        entries = {place.file: files.FileEntry(place.size, place.checksum) for place in places.values()}
        for name, entry in entries.items():
            if self.scattered and not (self.temporary / name).exists():
                continue  # its machine uploads it
            with files.open_regular(self.temporary / name, entry.size):
                pass  # raises if another machine wrote the file to a directory that is not shared
        tensors = {name: _describe(name, stored, places) for name, stored in metadata.state_dict_metadata.items()}
        own = metadata.planner_data
        state = {"format": files.FORMAT, "step": self.step, "world_size": len(own), "shared": self.shared, "own": own}
        table = {"format": files.FORMAT, "byteorder": sys.byteorder, "tensors": tensors}
        with _disk_errors(self.directory):
            entries[files.METADATA] = files.write_json(self.temporary / files.METADATA, table)
            entries[files.STATE] = files.write_json(self.temporary / files.STATE, state)
            files.write_manifest(self.temporary, self.step, entries)
            files.commit(self.temporary, self.directory, self.step)

    def discard(self) -> None:
        """Remove the temporary directory of a failed save."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Convert an OSError to a CheckpointError with the free space, because other ranks receive only its text."""
    try:
        yield
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f", {size(shutil.disk_usage(directory).free)} are free there"
        raise CheckpointError(f"{error.strerror or error}{free}") from error


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _describe(name: str, stored: Any, places: Mapping[MetadataIndex, ChunkLocation]) -> dict[str, Any]:
    chunks = []
    for chunk in stored.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": place.file, "start": place.start}
        )
    return {"dtype": DTYPE_NAMES[stored.properties.dtype], "shape": list(stored.size), "chunks": chunks}
