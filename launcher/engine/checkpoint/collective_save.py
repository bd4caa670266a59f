"""Collective save of one checkpoint on all ranks, like `torch.distributed.checkpoint.save` but without pickle.

    every rank     sends the list of tensors it can write             -> rank 0
    rank 0         assigns tensors and files to ranks                 -> every rank
    every rank     writes its file, sends the position of each chunk  -> rank 0
    rank 0         writes metadata and manifest, renames the directory

A rank that fails sends its error in place of its result, and all ranks raise `RanksFailed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from launcher.engine import objects
from launcher.engine.checkpoint.reader import DTYPE_NAMES, DTYPES
from launcher.engine.checkpoint.writer import CheckpointWriter, ChunkLocation, Planner
from launcher.errors import CheckpointError


class RanksFailed(Exception):
    """One or more ranks failed to save a checkpoint. `causes` maps each failed rank to its error message."""

    def __init__(self, causes: dict[int, str]) -> None:
        super().__init__("; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items())))
        self.causes = causes


def describe_error(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def write(writer: CheckpointWriter, planner: Planner, group: dist.ProcessGroup | None) -> None:
    """Write a checkpoint. A collective over `group` (None: a single process).

    Raises:
        RanksFailed: at least one rank failed; raised on every rank.
    """
    metadata: Metadata | None = None

    def plan(offers: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan([_plan_of(offer) for offer in offers])
        plans = writer.prepare_global_plan(plans)
        return [_assignment_of(one, offer) for one, offer in zip(plans, offers, strict=True)]

    def finish(written: list[Any]) -> list[Any]:
        assert metadata is not None
        writer.finish(metadata, [[_result_of(one) for one in results] for results in written])
        return [None] * len(written)

    assignment = _step(lambda: _offer_of(planner.create_local_plan()), plan, group)

    def data() -> list[Any]:
        items = [planner.plan.items[index] for index in assignment["items"]]
        results = writer.write_data(SavePlan(items, storage_data=assignment["file"]), planner).value()
        return [[*_key_of(one.index), one.size_in_bytes, asdict(one.storage_data)] for one in results]

    _step(data, finish, group)


def _step(own: Callable[[], Any], decide: Callable[[list[Any]], list[Any]], group: dist.ProcessGroup | None) -> Any:
    """Call `own` on every rank, then `decide` on rank 0 with all results; return this rank's entry of its result."""
    result = _attempt(own)
    results = [result] if group is None else objects.gather(result, group)
    decision: dict[str, Any] = {}
    if results is not None:
        causes = {rank: one["cause"] for rank, one in enumerate(results) if "cause" in one}
        if not causes:
            decision = _attempt(lambda: decide([one["value"] for one in results]))
            causes = {0: decision["cause"]} if "cause" in decision else {}
        decision["causes"] = causes
    if group is not None:
        decision = objects.broadcast(decision, group)
    if decision["causes"]:
        raise RanksFailed(decision["causes"])
    return decision["value"][0 if group is None else dist.get_rank(group)]


def _attempt(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": function()}
    except Exception as error:
        return {"cause": describe_error(error)}


# ---- plans and results as plain data --------------------------------------------------------------------------------


def _offer_of(plan: SavePlan) -> dict[str, Any]:
    items = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        dtype = DTYPE_NAMES[data.properties.dtype]
        items.append([*_key_of(item.index), list(data.chunk.sizes), list(data.size), dtype, item.type.name])
    return {"items": items, "own": json.dumps(plan.planner_data)}


def _plan_of(offer: dict[str, Any]) -> SavePlan:
    items = []
    for name, offsets, sizes, shape, dtype, kind in offer["items"]:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape))
        items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType[kind], tensor_data=data))
    return SavePlan(items, planner_data=json.loads(offer["own"]))


def _assignment_of(plan: SavePlan, offer: dict[str, Any]) -> dict[str, Any]:
    """Return the indices of the offered items that the rank writes, and the file."""
    positions = {(name, tuple(offsets)): number for number, (name, offsets, *_) in enumerate(offer["items"])}
    chosen = [positions[name, tuple(offsets)] for name, offsets in (_key_of(item.index) for item in plan.items)]
    return {"items": chosen, "file": plan.storage_data}


def _result_of(written: list[Any]) -> WriteResult:
    name, offsets, size, location = written
    return WriteResult(MetadataIndex(name, torch.Size(offsets)), size, ChunkLocation(**location))


def _key_of(index: MetadataIndex) -> tuple[str, list[int]]:
    assert index.offset is not None
    return index.fqn, list(index.offset)
