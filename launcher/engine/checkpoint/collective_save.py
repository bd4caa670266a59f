"""Planning and writing one checkpoint on all ranks, as `torch.distributed.checkpoint.save` does, without its pickles.

    every rank     what it could write             -> rank 0
    rank 0         who writes what, into which file -> every rank
    every rank     writes; where each chunk is      -> rank 0
    rank 0         metadata, manifest, name

A rank that fails says so in its place, and all ranks raise `RanksFailed`.
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
    """Ranks that failed. causes: rank -> what happened there, in words."""

    def __init__(self, causes: dict[int, str]) -> None:
        super().__init__("; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items())))
        self.causes = causes


def describe_error(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def write(writer: CheckpointWriter, planner: Planner, group: dist.ProcessGroup | None) -> None:
    """Write a checkpoint; every rank of `group` (None: this process alone) calls it.

    Raises:
        RanksFailed: on every rank, where one of them failed.
    """
    metadata: Metadata | None = None

    def plan(offers: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan([_plan_of(offer) for offer in offers])
        return [_order_of(one, offer) for one, offer in zip(writer.prepare_global_plan(plans), offers, strict=True)]

    def finish(written: list[Any]) -> list[Any]:
        assert metadata is not None
        writer.finish(metadata, [[_result_of(one) for one in results] for results in written])
        return [None] * len(written)

    order = _step(lambda: _offer_of(planner.create_local_plan()), plan, group)

    def data() -> list[Any]:
        items = [planner.plan.items[index] for index in order["items"]]
        results = writer.write_data(SavePlan(items, storage_data=order["file"]), planner).value()
        return [[*_key_of(one.index), one.size_in_bytes, asdict(one.storage_data)] for one in results]

    _step(data, finish, group)


def _step(own: Callable[[], Any], decide: Callable[[list[Any]], list[Any]], group: dist.ProcessGroup | None) -> Any:
    """Do `own` on every rank and, with what all of them returned, `decide` on rank 0. Returns this rank's part."""
    said = _attempt(own)
    everyone = [said] if group is None else objects.gather(said, group)
    answer: dict[str, Any] = {}
    if everyone is not None:
        causes = {rank: one["cause"] for rank, one in enumerate(everyone) if "cause" in one}
        if not causes:
            answer = _attempt(lambda: decide([one["value"] for one in everyone]))
            causes = {0: answer["cause"]} if "cause" in answer else {}
        answer["causes"] = causes
    if group is not None:
        answer = objects.broadcast(answer, group)
    if answer["causes"]:
        raise RanksFailed(answer["causes"])
    return answer["value"][0 if group is None else dist.get_rank(group)]


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
    return {"items": items, "own": json.dumps(plan.planner_data)}  # as text: it is JSON that names tensors


def _plan_of(offer: dict[str, Any]) -> SavePlan:
    items = []
    for name, offsets, sizes, shape, dtype, kind in offer["items"]:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape))
        items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType[kind], tensor_data=data))
    return SavePlan(items, planner_data=json.loads(offer["own"]))


def _order_of(plan: SavePlan, offer: dict[str, Any]) -> dict[str, Any]:
    """Return which of the offered items the rank writes, by number, and where."""
    positions = {(name, tuple(offsets)): number for number, (name, offsets, *_) in enumerate(offer["items"])}
    chosen = [positions[name, tuple(offsets)] for name, offsets in (_key_of(item.index) for item in plan.items)]
    return {"items": chosen, "file": plan.storage_data}


def _result_of(found: list[Any]) -> WriteResult:
    name, offsets, size, place = found
    return WriteResult(MetadataIndex(name, torch.Size(offsets)), size, ChunkLocation(**place))


def _key_of(index: MetadataIndex) -> tuple[str, list[int]]:
    assert index.offset is not None
    return index.fqn, list(index.offset)
