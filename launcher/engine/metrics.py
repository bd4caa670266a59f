"""Computes exact means of metrics over all samples of all workers: sum, count, divide once, globally.

Every metric is accumulated as a sum and a count on the device and reduced over the workers once per log interval. In
deterministic mode the sums are fixed-point integers, whose total does not depend on the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from launcher.engine.runtime import Runtime
from launcher.errors import UserCodeError

# Fixed point in two limbs: value = high * 2**-20 + low * 2**-60. The high limb holds sums up to 8.8e12. The low limb is
# carried into the high one at every addition, so each addend has a resolution of 2**-60 (8.7e-19). A third number
# counts the addends that are NaN or too large; if it is not zero, the sum is NaN.
_HIGH = 2.0**20
_LOW = 2.0**60
_CARRY_BITS = 40
_LARGEST = 2.0**42
LIMBS = 3

# Names that the engine itself logs.
RESERVED = frozenset({"step", "epoch", "samples", "time", "grad_norm", "learning_rate"})

Value = torch.Tensor | tuple[Any, Any]


class ContractError(UserCodeError):
    """The result of a step of the model is not a mapping of names to per-sample tensors or (sum, count) pairs."""

    def __init__(self, message: str, traceback_text: str = "") -> None:
        super().__init__(message, traceback_text)


def as_pair(name: str, value: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the (sum, count) of one entry of the result of `training_step`.

    For a tensor of one or more dimensions they are its sum and its number of elements; a pair is returned as it is.

    Raises:
        ContractError: the value is a scalar, is complex, or has another type.
    """
    if isinstance(value, torch.Tensor) and value.ndim > 0 and not value.is_complex():
        # 16-bit sums have only three digits, and float16 overflows at 65504.
        narrow = value.dtype in (torch.bfloat16, torch.float16)
        return value.sum(dtype=torch.float32 if narrow else None), float(value.numel())
    if isinstance(value, (tuple, list)) and len(value) == 2:
        total, count = value
        if not isinstance(total, torch.Tensor):
            total = torch.tensor(_number(name, value, total))
        if not isinstance(count, torch.Tensor):
            count = _number(name, value, count)
        elif count.ndim:
            raise _invalid(name, value)
        if not total.is_complex() and not (isinstance(count, torch.Tensor) and count.is_complex()):
            return total, count
    raise _invalid(name, value)


def _number(name: str, pair: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise _invalid(name, pair) from None


def _invalid(name: str, value: Any) -> ContractError:
    return ContractError(
        f'training_step and validation_step must return one value per sample under "{name}", or a pair (sum, count) '
        f"whose count is one number; found {_describe(value)}. "
        'Compute the loss with reduction="none", so that the mean over all workers is exact.'
    )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = "complex tensor" if value.is_complex() else "tensor"
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        if len(value) == 2:
            return f"a pair of {' and '.join(map(_describe, value))}"
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def check_answer(answer: Any, step: str = "training_step") -> dict[str, Value]:
    """Return the result of a step as a dictionary. ContractError if it is not a mapping, or lacks a training loss."""
    if not isinstance(answer, Mapping):
        raise ContractError(
            f'{step} must return a mapping such as {{"loss": per-sample tensor}}; found a {type(answer).__name__}.'
        )
    if step == "training_step" and "loss" not in answer:
        names = ", ".join(str(key) for key in answer) or "nothing"
        raise ContractError(f'training_step must return the value to minimise under "loss"; found {names}.')
    return dict(answer)


def check_names(names: Iterable[Any], source: str) -> None:
    """Raise ContractError if the name of a metric is not text, or is one that the engine uses itself.

    Args:
        source: the method that returned the names, such as `training_step`.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise ContractError(f"{source} must return a mapping whose names are text; found the name {name!r}.")
        if name in RESERVED:
            raise ContractError(
                f'{source} returns "{name}", which launch itself logs. Choose another name, such as "my_{name}".'
            )


class Sums:
    """Accumulates the (sum, count) of every metric of one rank, on the device.

    Args:
        exact: add in fixed point, so that the total does not depend on the grouping and order of the values.
    """

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self._device = device
        self._exact = exact
        # float64 (…), or int64 (LIMBS, …) if exact. On the CPU a scalar is a Python float, which is equivalent to
        # float64; an operation on a tensor takes several times as long.
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, torch.Tensor | float] = {}
        self._plain = device.type == "cpu" and not exact

    @property
    def names(self) -> list[str]:
        return sorted(self._sums)

    def declare_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Create zero sums by the shapes of the stored sums, so that a rank without samples can join the reduction."""
        for name, shape in shapes.items():
            self._sums[name] = self._zero(shape)
            self._counts[name] = self._zero((LIMBS,) if self._exact else ())

    @torch.no_grad()
    def add(self, answer: Mapping[str, Value]) -> None:
        """Add the result of the model for one microbatch.

        Raises:
            ContractError: its names or shapes differ from those of earlier microbatches.
        """
        if self._sums and answer.keys() != self._sums.keys():
            odd = sorted(answer.keys() ^ self._sums.keys())
            when = "in this batch and not before" if odd[0] in answer else "before and not in this batch"
            raise ContractError(
                f"The model must return the same names for every batch; it returned {', '.join(odd)} {when}. Return a "
                "count of 0 for a metric that a batch does not have: (0.0, 0)."
            )
        total: torch.Tensor
        count: torch.Tensor | float
        for name, value in answer.items():
            if self._exact and isinstance(value, torch.Tensor) and value.ndim > 0:
                # Each element is rounded separately, so that the split into microbatches does not matter.
                total, count = to_limbs(value).flatten(1).sum(1), to_limbs(float(value.numel()))
                total = _carry(total)
            else:
                pair = as_pair(name, value)
                if self._exact:
                    total, count = to_limbs(pair[0]), to_limbs(pair[1])
                else:
                    total, count = pair[0].detach(), pair[1]
            self._accumulate(self._sums, name, total)
            self._accumulate(self._counts, name, count)

    def _zero(self, shape: tuple[int, ...]) -> torch.Tensor | float:
        if self._plain and not shape:
            return 0.0
        return torch.zeros(shape, dtype=torch.int64 if self._exact else torch.float64, device=self._device)

    def _accumulate(self, into: dict[str, torch.Tensor | float], name: str, value: torch.Tensor | float) -> None:
        shape: tuple[int, ...] = ()
        if isinstance(value, torch.Tensor) and value.ndim:
            shape, value = tuple(value.shape), value.to(self._device)
        if name not in into:
            into[name] = self._zero(shape)
        before = into[name]
        if _shape(before) != shape:
            raise ContractError(
                f'The shape of the metric "{name}" changed from {_shape(before)} to {shape}. Return the same shape for '
                "every batch."
            )
        if isinstance(before, float):
            into[name] = before + (value.detach().item() if isinstance(value, torch.Tensor) else value)
            return
        # A number is passed to the device as an argument of the addition; copying it would synchronize the device.
        before += value
        if self._exact:
            _carry(before)

    def reduce(self, runtime: Runtime) -> dict[str, tuple[torch.Tensor, float]]:
        """Return the global {name: (sum, count)} as float64 on the host. One all-reduce; the local sums are kept.

        All ranks must have the same names and shapes; see `declare_shapes`.
        """
        names = self.names
        if not names:
            return {}
        parts = [_tensor(value) for name in names for value in (self._sums[name], self._counts[name])]
        flat = torch.cat([part.reshape(-1) for part in parts])
        reduced = runtime.add_up(flat).cpu()
        pieces = torch.split(reduced, [part.numel() for part in parts])
        stored = [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        shaped = [from_limbs(piece) for piece in stored] if self._exact else stored
        return {name: (shaped[2 * i], float(shaped[2 * i + 1])) for i, name in enumerate(names)}

    def reset(self) -> None:
        """Set all sums and counts to zero; keep the names."""
        for values in (self._sums, self._counts):
            for name, value in values.items():
                values[name] = value.zero_() if isinstance(value, torch.Tensor) else 0.0

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        parts = {"sums": self._sums, "counts": self._counts}
        return {kind: {name: _tensor(value) for name, value in values.items()} for kind, values in parts.items()}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Replace the sums by the total of `states`. Metrics that the model no longer returns are dropped.

        After a resume with the same number of workers, each rank loads its own state; otherwise one rank loads all.
        """
        self.reset()
        for state in states:
            for kind, into in (("sums", self._sums), ("counts", self._counts)):
                for name in into.keys() & state[kind].keys():
                    self._accumulate(into, name, state[kind][name])


def _tensor(value: torch.Tensor | float) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def _shape(value: torch.Tensor | float) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def to_limbs(value: torch.Tensor | float) -> torch.Tensor:
    """Convert numbers (…) to fixed point, int64 (LIMBS, …), whose sums are exact in any order."""
    number = torch.as_tensor(value).detach().double()
    fits = number.abs() < _LARGEST
    number = torch.where(fits, number, 0.0)
    high = torch.round(number * _HIGH)
    low = torch.round((number - high / _HIGH) * _LOW)
    return torch.stack([high, low, (~fits).double()]).long()


def from_limbs(limbs: torch.Tensor) -> torch.Tensor:
    """Convert a sum of `to_limbs` to float64 (…) on the host; NaN if an addend was NaN or too large."""
    # Python integers and one division are correctly rounded, even if the limbs are not carried after a reduction.
    values = [
        math.nan if unfit else ((high << _CARRY_BITS) + low) / (1 << 60)
        for high, low, unfit in zip(*limbs.reshape(LIMBS, -1).tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(limbs.shape[1:])


def _carry(limbs: torch.Tensor) -> torch.Tensor:
    """Carry the overflow of the low limb into the high one, in place. limbs: int64 (LIMBS, …)."""
    overflow = limbs[1] >> _CARRY_BITS
    limbs[0] += overflow
    limbs[1] -= overflow << _CARRY_BITS
    return limbs


def means(totals: Mapping[str, tuple[torch.Tensor, float]]) -> dict[str, float]:
    """Return {name: sum / count} of every scalar metric; NaN for a count of zero."""
    return {
        name: float(total) / count if count else math.nan for name, (total, count) in totals.items() if total.ndim == 0
    }
