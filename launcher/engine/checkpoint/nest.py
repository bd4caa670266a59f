"""Lossless conversion of nested state to plain JSON with references to tensors, and back.

Supported types: dict (keys: str, int, float, bool, None or tuples of these), list, tuple, Counter, Tensor, DTensor,
numpy array, int, float (with infinities and NaN), str, bool, None. Their JSON:

    str, int, bool, None, finite float, list, and dict with plain string keys     unchanged
    {"$tuple": […]}  {"$dict": [[key, value], …]}  {"$counter": [[key, n], …]}    other containers
    {"$float": "inf" | "-inf" | "nan"}                                            floats that JSON does not have
    {"$tensor": name}  {"$array": name}                                           a stored tensor or numpy array
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.errors import CheckpointError

_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_ARRAYS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a stored tensor: the placeholder of a tensor in the nest that `inspect` returns."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    array: bool = False

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


class Encoder:
    """Converts nests to JSON and collects their tensors by name. Plain tensors that share memory get one name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, where: str) -> Any:
        """Return the JSON of `value`, whose path in the nest is `where`; it becomes the name of a tensor.

        Raises:
            CheckpointError: the type of a value is not supported.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, np.generic):
            return self.encode(value.item(), where)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, Tensor):
            return {"$tensor": self._add(value, where)}
        if isinstance(value, np.ndarray) and value.dtype.name in _ARRAYS:
            native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            return {"$array": self._add(torch.from_numpy(native), where)}
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{where}/{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Counter):
            return {"$counter": self._pairs(value, where)}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(item, f"{where}/{key}") for key, item in value.items()}
            return {"$dict": self._pairs(value, where)}
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot contain: "
            "checkpoints are read without executing code, so they contain only tensors, numbers, strings, booleans, "
            "None, and lists, tuples and dicts of these. Return one of those from state_dict()."
        )

    def _pairs(self, value: Mapping[Any, Any], where: str) -> list[Any]:
        for key in value:
            if not isinstance(key, str | int | float | tuple | None):
                raise CheckpointError(
                    f"{where} has a key {key!r} of type {type(key).__qualname__}, which a checkpoint cannot contain. "
                    "Use a string or a number."
                )
        return [[self.encode(key, f"{where}/key"), self.encode(item, f"{where}/{key}")] for key, item in value.items()]

    def _add(self, tensor: Tensor, where: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{where} is a {tensor.layout} tensor; a checkpoint contains only dense tensors. Store its indices and "
                "values as dense tensors."
            )
        identity: tuple[Any, ...] | None = None
        if not isinstance(tensor, DTensor) and tensor.numel() > 0:
            identity = (
                tensor.device,
                tensor.data_ptr(),
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
            )
            if identity in self._names:
                return self._names[identity]
        name = where
        while name in self.tensors:  # possible only if keys contain slashes
            name += "~"
        self.tensors[name] = tensor
        if identity is not None:
            self._names[identity] = name
        return name


def decode(value: Any, tensors: Mapping[str, TensorInfo]) -> Any:
    """Return the nest that `value` (JSON of an `Encoder`) describes, with the entries of `tensors` as its tensors.

    Raises:
        ValueError: `value` is not valid.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next((key for key in value if key.startswith("$")), None)
    if kind is None:
        return {key: decode(item, tensors) for key, item in value.items()}
    content = value[kind]
    if len(value) == 1 and isinstance(content, str):
        if kind == "$float" and content in _FLOATS:
            return _FLOATS[content]
        if kind in ("$tensor", "$array") and content in tensors:
            return tensors[content] if kind == "$tensor" else replace(tensors[content], array=True)
    elif len(value) == 1 and isinstance(content, list):
        if kind == "$tuple":
            return tuple(decode(item, tensors) for item in content)
        if kind in ("$dict", "$counter") and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            pairs = {_hashable(decode(key, tensors)): decode(item, tensors) for key, item in content}
            return Counter(pairs) if kind == "$counter" else pairs
    raise ValueError(f"{kind} with invalid content")


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError as error:
        raise ValueError("a key that is not hashable") from error
    return key


class Mismatch(CheckpointError):
    """The tensors of a checkpoint differ from those of the state that it is loaded into.

    Attributes:
        missing: paths of tensors that the checkpoint lacks, such as `model/net.0.weight`.
        unexpected: paths of tensors that only the checkpoint has.
        differing: path -> (found, expected), each as text like "(10, 5) float32".
    """

    def __init__(
        self, path: str, missing: list[str], unexpected: list[str], differing: dict[str, tuple[str, str]]
    ) -> None:
        parts = []
        if missing:
            parts.append(f"it lacks {_some(missing)}")
        if unexpected:
            parts.append(f"it has {_some(unexpected)}, which the model does not have")
        if differing:
            parts.append(
                _some(
                    [f"{name} is {found} and {expected} is expected" for name, (found, expected) in differing.items()]
                )
            )
        super().__init__(
            f"The checkpoint {path} does not fit this model and optimizer: {'; '.join(parts)}. Use the configuration "
            "that it was saved with, or load only its weights with checkpoint.load and checkpoint.load_strict=false."
        )
        self.path, self.missing, self.unexpected, self.differing = path, missing, unexpected, differing

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.missing, self.unexpected, self.differing)


def _some(words: list[str]) -> str:
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


class Binder:
    """Traverses a saved nest and the nest to load into, and assigns stored tensors to their destinations.

    The top level of the nest to load into may lack sections of the checkpoint; a section that it has must have the same
    tensors.

    Attributes:
        reads: list of (stored tensor, destination).
        missing, unexpected, differing: see `Mismatch`.
    """

    def __init__(self) -> None:
        self.reads: list[tuple[TensorInfo, Tensor]] = []
        self._new_tensors: dict[str, Tensor] = {}  # by name, so that tied weights stay tied and share memory
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.differing: dict[str, tuple[str, str]] = {}

    def bind(self, saved: Any, into: Any, where: str = "") -> Any:
        """Return `saved` with every TensorInfo replaced by the tensor of `into`, or by a new CPU tensor.

        A callable in `into` is called with its part of `saved` and returns the nest to load into.
        """
        if isinstance(into, Callable) and not isinstance(into, Tensor):  # type: ignore[arg-type]
            into = into(saved)
        if isinstance(saved, TensorInfo):
            return self._tensor(saved, into, where)
        if isinstance(into, Tensor):
            self.differing[where] = (f"a {type(saved).__name__}", _describe(into))
            return saved
        if isinstance(saved, Counter):
            return saved
        if isinstance(saved, dict):
            given = into if isinstance(into, Mapping) else None
            self._compare(saved, given, where)
            return {
                key: self.bind(item, given.get(key) if given else None, _join(where, key))
                for key, item in saved.items()
            }
        if isinstance(saved, list | tuple):
            # As mappings by position, lists are checked for missing and unexpected entries too.
            listed = dict(enumerate(into)) if isinstance(into, list | tuple) else None
            return type(saved)(self.bind(dict(enumerate(saved)), listed, where).values())
        return saved

    def _tensor(self, saved: TensorInfo, into: Any, where: str) -> Any:
        if isinstance(into, Tensor):
            if tuple(into.shape) != saved.shape or into.dtype != saved.dtype:
                self.differing[where] = (str(saved), _describe(into))
            else:
                self.reads.append((saved, into))
            return into
        tensor = self._new_tensors.get(saved.name)
        if tensor is None:
            tensor = self._new_tensors[saved.name] = torch.empty(saved.shape, dtype=saved.dtype)
            self.reads.append((saved, tensor))
        return tensor.numpy() if saved.array else tensor

    def _compare(self, saved: Mapping[Any, Any], given: Mapping[Any, Any] | None, where: str) -> None:
        if given is None or not where:
            return
        self.missing += [_join(where, key) for key, item in given.items() if key not in saved and _has_tensor(item)]
        self.unexpected += [_join(where, key) for key, item in saved.items() if key not in given and _has_tensor(item)]


def _join(where: str, key: Any) -> str:
    return f"{where}/{key}" if where else str(key)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _has_tensor(nest: Any) -> bool:
    if isinstance(nest, Mapping):
        return any(_has_tensor(item) for item in nest.values())
    if isinstance(nest, list | tuple):
        return any(_has_tensor(item) for item in nest)
    return isinstance(nest, Tensor | TensorInfo)
