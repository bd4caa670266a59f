"""Finds the sample that prevents a batch from being collated, so that the error message can name it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_COLLATED = (torch.Tensor, np.ndarray, np.generic, float, int, str, bytes, Mapping, tuple, list)


def find_mismatched_sample(
    samples: Sequence[Any], indices: Sequence[int], name: str, shapes: bool = True
) -> str | None:
    """Return a sentence that names the sample with another form than most samples of the batch, or None.

    Args:
        indices: the index of each sample in the data set.
        name: name of the data set, for the sentence.
        shapes: whether to compare shapes and lengths too, and to report types that `default_collate` does not support.
    """
    found = _odd(samples, "", shapes)
    if found is None:
        return None
    number, what = found
    index = indices[number] if number < len(indices) else number
    return f"Sample {index} of {name} {what}."


def _odd(values: Sequence[Any], path: str, shapes: bool) -> tuple[int, str] | None:
    """Return (position in the batch, description of the difference), or None."""
    at = f" at {path}" if path else ""
    kinds = [_kind(value) for value in values]
    if (odd := _differs(kinds)) is not None:
        number, usual = odd
        return number, f"is {kinds[number]}{at}; other samples of its batch are {usual}"
    first = values[0]
    if shapes and (first is None or not isinstance(first, _COLLATED)):
        return 0, f"is {kinds[0]}{at}, which cannot be put into a batch"
    if isinstance(first, (torch.Tensor, np.ndarray)):
        odd = _differs([str(tuple(value.shape)) for value in values]) if shapes else None
        if odd is not None:
            return odd[0], f"has the shape {tuple(values[odd[0]].shape)}{at}; other samples of its batch have {odd[1]}"
        if shapes and isinstance(first, np.ndarray) and first.dtype.kind not in "biufc":
            return 0, f"is an array of {first.dtype}{at}, which cannot be put into a batch"
        return None
    if isinstance(first, Mapping):
        if (odd := _differs([str(sorted(map(str, value))) for value in values])) is not None:
            return odd[0], f"has the keys {sorted(map(str, values[odd[0]]))}{at}; others of its batch have {odd[1]}"
        return _first_odd([(f"{path}[{key!r}]", [value[key] for value in values]) for key in first], shapes)
    if isinstance(first, (tuple, list)):
        if shapes and (odd := _differs([str(len(value)) for value in values])) is not None:
            return odd[0], f"has {len(values[odd[0]])} parts{at}; other samples of its batch have {odd[1]}"
        short = min(len(value) for value in values)
        return _first_odd([(f"{path}[{i}]", [value[i] for value in values]) for i in range(short)], shapes)
    return None


def _first_odd(parts: list[tuple[str, list[Any]]], shapes: bool) -> tuple[int, str] | None:
    return next((odd for path, values in parts if (odd := _odd(values, path, shapes)) is not None), None)


def _differs(forms: list[str]) -> tuple[int, str] | None:
    """Return (position of the first form that differs from the most common one, the most common form), or None."""
    usual = Counter(forms).most_common(1)[0][0]
    return next(((number, usual) for number, form in enumerate(forms) if form != usual), None)


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return "a Tensor"
    return f"a {type(value).__name__}"
