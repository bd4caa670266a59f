"""Views of tensors."""

from __future__ import annotations

from torch import Tensor, view_as_real


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of a complex tensor (…) as pairs of real numbers (…, 2); return any other tensor unchanged."""
    return view_as_real(tensor) if tensor.is_complex() else tensor
