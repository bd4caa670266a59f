"""Functions that read a checkpoint: all of it into existing tensors, or only its weights. No code in it is executed."""

from __future__ import annotations

import importlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from launcher.engine.checkpoint import files, nest, reader
from launcher.errors import CheckpointError

_KEYS = ("state_dict", "model_state_dict", "model")  # usual keys of a state dict within a file of torch.save


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint. `inspect` returns a `TensorInfo` for every tensor, `load` the tensors themselves.

    `state` is shared by all ranks; `own[r]` is the state of rank r alone, for each rank of the `world_size` that saved.
    """

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]
    own: list[Any]


def inspect(path: str | os.PathLike[str]) -> Content:
    """Read everything except the data of the tensors.

    Raises:
        CheckpointError: a file is missing, damaged or forged; the message names it.
    """
    return _open(Path(path))[0]


def load(
    path: str | os.PathLike[str],
    into: Mapping[str, Any] | None = None,
    *,
    verified: bool = False,
    rank: tuple[int, int] | None = None,
) -> Content:
    """Read the checkpoint at `path`, without collectives: each rank reads the tensors that it needs.

    The number of ranks may differ from the number that saved. Numpy arrays are returned as numpy arrays.

    Args:
        into: a nest like the saved one, whose tensors (also DTensors) are filled in place and returned. A callable in
            it receives its part of the result of `inspect` and returns the nest to fill. Sections that `into` lacks are
            returned as new CPU tensors.
        verified: True if `newest_intact` or `verify` has just verified this path.
        rank: (this rank, number of ranks). If as many ranks saved, the tensors in the `own` state of other ranks are
            not read and remain `TensorInfo`.

    Raises:
        Mismatch: tensors of `into` are missing, unexpected or different; raised before anything is read.
        CheckpointError: a file is missing, damaged or forged; the message names it.
    """
    path = Path(path)
    if not verified:
        files.verify(path)
    content, entries, table = _open(path)
    binder = nest.Binder()
    state = binder.bind(content.state, into)
    mine = rank[0] if rank is not None and rank[1] == content.world_size else None
    own = [
        saved if mine is not None and number != mine else binder.bind(saved, None, f"own/{number}")
        for number, saved in enumerate(content.own)
    ]
    if binder.missing or binder.unexpected or binder.differing:
        raise nest.Mismatch(str(path), binder.missing, binder.unexpected, binder.differing)
    _read(path, entries, table, binder.reads)
    return Content(path, content.step, content.world_size, state, own)


class Weights(dict[str, Tensor]):
    """Weights by name. `key` is their key within a file of torch.save, or None if they are at its top level."""

    key: str | None = None

    def __reduce__(self) -> Any:
        """Pickle like a state dict, which `torch.load` reads with weights_only=True."""
        return OrderedDict, (), None, None, iter(self.items())


def load_weights(path: str | os.PathLike[str], section: str | None = None, *, shapes_only: bool = False) -> Weights:
    """Return weights as name -> full tensor on the CPU.

    Args:
        path: a checkpoint directory, a `.safetensors` file, or a file of torch.save with a state dict, or with a dict
            that has one as "state_dict", "model_state_dict" or "model".
        section: of a checkpoint; by default `weights` (the averaged weights) if present, else `model`.
        shapes_only: return tensors without data (device "meta").

    Raises:
        CheckpointError: the file has another format, or contains other objects than tensors and plain values.
    """
    path, key = Path(path), None
    if path.is_dir():
        content: Mapping[str, Any] = _section(path, section, shapes_only)
    elif not path.exists():
        raise CheckpointError(f"There is no checkpoint or file of weights at {path}.")
    elif path.suffix == ".safetensors":
        content = _load_safetensors(path, shapes_only)
    else:
        content, key = _load_torch(path, shapes_only)
    weights = Weights((name, value) for name, value in content.items() if isinstance(value, Tensor))
    weights.key = key
    if not weights:
        raise CheckpointError(
            f"{path} contains no weights. Use a checkpoint, a .safetensors file or a saved state dict."
        )
    return weights


def _open(path: Path) -> tuple[Content, dict[str, files.FileEntry], dict[str, reader.StoredTensor]]:
    entries = files.read_manifest(path)
    for name, entry in entries.items():
        with files.open_regular(path / name, entry.size):
            pass  # the metadata is checked against these sizes
    table = reader.read_table(path, entries)
    file = path / files.STATE
    raw = files.read_json(file, entries[files.STATE].size)
    infos = {name: stored.info for name, stored in table.items()}
    try:
        step, world_size = raw["step"], raw["world_size"]
        state, own = nest.decode(raw["shared"], infos), nest.decode(raw["own"], infos)
        if not (
            raw["format"] == files.FORMAT and type(step) is int and isinstance(state, dict) and isinstance(own, list)
        ):
            raise ValueError(f"not the state of a checkpoint of format {files.FORMAT}")
        if world_size != len(own):
            raise ValueError(f"{world_size} ranks and {len(own)} states of ranks")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or forged: {error}.") from error
    return Content(path, step, world_size, state, own), entries, table


def _read(
    path: Path,
    entries: Mapping[str, files.FileEntry],
    table: Mapping[str, reader.StoredTensor],
    reads: list[tuple[nest.TensorInfo, Tensor]],
) -> None:
    """Fill the destinations. Keys are positions, because tied weights are stored once and read into two tensors."""
    requested = {f"{index}": table[info.name] for index, (info, _) in enumerate(reads)}
    targets: dict[str, Any] = {f"{index}": target for index, (_, target) in enumerate(reads)}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                targets, storage_reader=reader.CheckpointReader(path, entries, requested), planner=planner, no_dist=True
            )
    except CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), error)
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(f"The checkpoint {path} cannot be read: {type(cause).__name__}: {cause}") from error


def _section(path: Path, section: str | None, shapes_only: bool) -> dict[str, Any]:
    if not shapes_only:
        files.verify(path)
    content, entries, table = _open(path)
    section = section or ("weights" if "weights" in content.state else "model")
    if not isinstance(content.state.get(section), dict):
        raise CheckpointError(
            f"The checkpoint {path} has no section {section!r}; it has {', '.join(content.state) or 'none'}."
        )
    if shapes_only:
        return {
            name: torch.empty(info.shape, dtype=info.dtype, device="meta")
            for name, info in content.state[section].items()
            if isinstance(info, nest.TensorInfo)
        }
    binder = nest.Binder()
    weights = binder.bind(content.state[section], None)
    _read(path, entries, table, binder.reads)
    return weights


def _load_safetensors(path: Path, shapes_only: bool) -> dict[str, Any]:
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise CheckpointError(f"Reading {path} needs the package safetensors: pip install safetensors.") from error
    try:
        if shapes_only:
            with importlib.import_module("safetensors").safe_open(path, "pt") as file:
                names = file.keys()
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError derives directly from Exception
        raise CheckpointError(f"{path} is not a valid .safetensors file: {error}") from error


def _load_torch(path: Path, shapes_only: bool) -> tuple[dict[str, Any], str | None]:
    """Return the state dict in a file of torch.save, and the key or keys (joined by dots) that lead to it."""
    try:
        content = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of exceptions for an invalid file
        raise CheckpointError(
            f"{path} cannot be read as a saved state dict ({type(error).__name__}): it is damaged, or it contains "
            "other objects than tensors and plain values, which could execute code and are rejected. Save "
            "model.state_dict() with torch.save, or as .safetensors."
        ) from error
    keys = []
    while isinstance(content, Mapping):
        key = next((key for key in _KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        keys.append(key)
        content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} contains a {type(content).__name__} instead of a state dict.")
    if not _has_tensors(content):
        inner = [str(key) for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        if inner:
            raise CheckpointError(
                f"{path} contains no weights at its top level or under {', '.join(_KEYS)}; it contains tensors under "
                f"{', '.join(inner)}. Save only that part, or save it under the key state_dict."
            )
    return {str(name): value for name, value in content.items()}, ".".join(keys) or None


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())
