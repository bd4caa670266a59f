"""Sum, count, divide once, globally.

Every metric is kept as a sum and a count on the device and reduced over the workers once per log interval. In
deterministic mode the sums are integers (fixed point), so that no order of addition can change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from launcher.engine.runtime import Runtime
from launcher.errors import UserCodeError

# Fixed point in two limbs: value = high * 2**-20 + low * 2**-60. The high limb holds sums up to 8.8e12; the low limb is
# carried into the high one at every addition, and keeps 2**-60 (8.7e-19) of each addend. A third number counts what
# is no number or too large for this; where there is any, the sum reads as NaN.
_HIGH = 2.0**20
_LOW = 2.0**60
_CARRY_BITS = 40
_LARGEST = 2.0**42
LIMBS = 3

# Of the engine itself, in `metrics.jsonl` and beside the model's tags.
RESERVED = frozenset({"step", "epoch", "samples", "time", "grad_norm", "learning_rate"})

Value = torch.Tensor | tuple[Any, Any]


class ContractError(UserCodeError):
    """The model does not return what `training_step` must return."""

    def __init__(self, message: str, traceback_text: str = "") -> None:
        super().__init__(message, traceback_text)


def as_pair(name: str, value: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the (sum, count) that one entry of `training_step`'s answer stands for.

    A tensor of one or more dimensions stands for its sum and its number of elements; a pair is taken as it is.

    Raises:
        ContractError: the value is a bare scalar, complex or something else.
    """
    if isinstance(value, torch.Tensor) and value.ndim > 0 and not value.is_complex():
        # 16-bit sums would keep three digits, and float16 ends at 65504.
        narrow = value.dtype in (torch.bfloat16, torch.float16)
        return value.sum(dtype=torch.float32 if narrow else None), float(value.numel())
    if isinstance(value, (tuple, list)) and len(value) == 2:
        total, count = value
        if not isinstance(total, torch.Tensor):
            total = torch.tensor(_number(name, value, total))
        if not isinstance(count, torch.Tensor):
            count = _number(name, value, count)
        elif count.ndim:
            raise _refused(name, value)
        if not total.is_complex() and not (isinstance(count, torch.Tensor) and count.is_complex()):
            return total, count
    raise _refused(name, value)


def _number(name: str, pair: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise _refused(name, pair) from None


def _refused(name: str, value: Any) -> ContractError:
    return ContractError(
        f'training_step and validation_step return one value per sample under "{name}", or a pair (sum, count) whose '
        f"count is one number; found {_described(value)}. "
        'Compute the loss with reduction="none", so that the mean over all workers can be exact.'
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = "complex tensor" if value.is_complex() else "tensor"
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        if len(value) == 2:
            return f"a pair of {' and '.join(map(_described, value))}"
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def check_answer(answer: Any, step: str = "training_step") -> dict[str, Value]:
    """Return the model's answer when it is a mapping of names to values, with `loss` for a training step."""
    if not isinstance(answer, Mapping):
        raise ContractError(
            f'{step} must return a mapping such as {{"loss": per-sample tensor}}; found a {type(answer).__name__}.'
        )
    if step == "training_step" and "loss" not in answer:
        names = ", ".join(str(key) for key in answer) or "nothing"
        raise ContractError(f'training_step must return "loss", which is minimised; found {names}.')
    return dict(answer)


def check_names(names: Iterable[Any], source: str) -> None:
    """Raise ContractError where a metric's name is no text, or one that the engine uses itself.

    source: what returned them, such as `training_step`.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise ContractError(f"{source} must return a mapping whose names are text; found the name {name!r}.")
        if name in RESERVED:
            raise ContractError(
                f'{source} returns "{name}", a name that launch itself logs. Choose another name, such as "my_{name}".'
            )


class Sums:
    """Running (sum, count) of every metric, per rank, on the device.

    Args:
        exact: add in fixed point; the total is then the same for every grouping and order of the same values.
    """

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self._device = device
        self._exact = exact
        # float64 (…) or, exact, int64 (LIMBS, …). On the CPU a single number is a Python float, whose additions are
        # those of float64: an operation on a tensor costs several times as much.
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, torch.Tensor | float] = {}
        self._plain = device.type == "cpu" and not exact

    @property
    def names(self) -> list[str]:
        return sorted(self._sums)

    def declare_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Know names by the shapes of their stored sums, at zero: a rank without samples still joins the reduction."""
        for name, shape in shapes.items():
            self._sums[name] = self._zero(shape)
            self._counts[name] = self._zero((LIMBS,) if self._exact else ())

    @torch.no_grad()
    def add(self, answer: Mapping[str, Value]) -> None:
        """Add what the model said of one microbatch.

        Raises:
            ContractError: its names or shapes are not those of the microbatches before; ranks could not add them up.
        """
        if self._sums and answer.keys() != self._sums.keys():
            odd = sorted(answer.keys() ^ self._sums.keys())
            here = "in this one and not before" if odd[0] in answer else "before and not in this one"
            raise ContractError(
                f"The model must return the same names for every batch; {', '.join(odd)}: {here}. Return a count of 0 "
                "where a batch has nothing to say: (0.0, 0)."
            )
        total: torch.Tensor
        count: torch.Tensor | float
        for name, value in answer.items():
            if self._exact and isinstance(value, torch.Tensor) and value.ndim > 0:
                # Each element is rounded by itself, so that the split into microbatches cannot matter.
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
                f'The sum under "{name}" had shape {_shape(before)} before and has {shape} now; a metric keeps its '
                "shape."
            )
        if isinstance(before, float):
            into[name] = before + (value.detach().item() if isinstance(value, torch.Tensor) else value)
            return
        # A number reaches the device as an argument of the addition; copying it would stop the device every step.
        before += value
        if self._exact:
            _carry(before)

    def reduce(self, runtime: Runtime) -> dict[str, tuple[torch.Tensor, float]]:
        """Return the global {name: (sum, count)} as float64 on the host. One collective; the running sums stay.

        All ranks must know the same names and shapes.
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
        """Set everything to zero and keep the names."""
        for values in (self._sums, self._counts):
            for name, value in values.items():
                values[name] = value.zero_() if isinstance(value, torch.Tensor) else 0.0

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        kept = {"sums": self._sums, "counts": self._counts}
        return {kind: {name: _tensor(value) for name, value in values.items()} for kind, values in kept.items()}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take the sum of `states`: one's own after a resume with as many workers, all of them on one rank else.

        What the model no longer returns is left out.
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
    """Return numbers (…) in fixed point, int64 (LIMBS, …): sums of it are exact in any order."""
    number = torch.as_tensor(value).detach().double()
    fits = number.abs() < _LARGEST
    number = torch.where(fits, number, 0.0)
    high = torch.round(number * _HIGH)
    low = torch.round((number - high / _HIGH) * _LOW)
    return torch.stack([high, low, (~fits).double()]).long()


def from_limbs(limbs: torch.Tensor) -> torch.Tensor:
    """Return what a sum of `to_limbs` stands for, float64 (…) on the host: NaN where one of the numbers was none."""
    # Python integers, then one division: correctly rounded, whatever the limbs look like after a sum over ranks.
    values = [
        math.nan if unfit else ((high << _CARRY_BITS) + low) / (1 << 60)
        for high, low, unfit in zip(*limbs.reshape(LIMBS, -1).tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(limbs.shape[1:])


def _carry(limbs: torch.Tensor) -> torch.Tensor:
    """Move whole high units out of the low limb, in place. The value is unchanged. limbs: int64 (LIMBS, …)."""
    overflow = limbs[1] >> _CARRY_BITS
    limbs[0] += overflow
    limbs[1] -= overflow << _CARRY_BITS
    return limbs


def means(totals: Mapping[str, tuple[torch.Tensor, float]]) -> dict[str, float]:
    """Return {name: sum / count} of every scalar metric. A count of zero gives NaN."""
    return {
        name: float(total) / count if count else math.nan for name, (total, count) in totals.items() if total.ndim == 0
    }
