"""Detects workers with diverging copies of the model.

At each log the workers compare, in one small all-reduce, checksums of the trained weights (the sum of their bits), the
set of trained parameters, and the set of parameters with gradients. If anything differs, a second comparison finds the
parameters and the ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.runtime import Runtime
from launcher.engine.tensors import as_real
from launcher.errors import TrainingError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_LAST_BITS = 1e-3  # largest rounding difference between GPU models, relative to a parameter's largest weight
_NAMED = 3  # names per message


@dataclass(frozen=True)
class Copy:
    """The state of one rank that is compared with the other ranks.

    Attributes:
        weights: (name, tensor) of all tensors that must be equal on all ranks.
        trained: names of the trained parameters.
        graded: names of the parameters with a gradient, or None if they may differ between ranks.
        unexpected: names of the parameters whose `requires_grad` changed during a step.
    """

    weights: Sequence[tuple[str, Tensor]]
    trained: Sequence[str]
    graded: Sequence[str] | None
    unexpected: Sequence[str]


class Drift:
    """Compares the copies of a model on all ranks.

    Args:
        kinds: the device model of each rank. If they differ, rounding differences between ranks are corrected.
        note: called with the note that reports such a correction.
    """

    def __init__(self, runtime: Runtime, kinds: Sequence[str], note: Callable[[str], None]) -> None:
        self._runtime, self._kinds, self._note = runtime, kinds, note
        self._noted = False

    @torch.no_grad()
    def check(self, own: Copy, step: int) -> None:
        """Compare the copies after a step. A collective.

        Raises:
            TrainingError: on every rank, if the copies differ or the set of trained parameters changed during a step;
                names parameters, ranks and step.
        """
        if self._runtime.alone:
            if own.unexpected:
                raise _changed_inside([own.unexpected], step)
            return
        facts = [_digest(own.trained), _digest(own.graded or ()), _digest(own.unexpected)]
        numbers = torch.cat([checksums([tensor for _, tensor in own.weights]).cpu(), torch.tensor(facts)])
        # All values are equal if the maximum equals the minimum. `unexpected` is an error even if it is equal on all.
        extremes = torch.cat([numbers, -numbers])
        if not self._runtime.alone:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._runtime.host_group)
        largest, smallest = extremes.chunk(2)
        if torch.equal(largest, -smallest) and not own.unexpected:
            return
        self._explain(own, step)

    def _explain(self, own: Copy, step: int) -> None:
        everyone = self._runtime.gather((list(own.unexpected), list(own.trained), own.graded and list(own.graded)))
        unexpected, trained, graded = zip(*everyone, strict=True)
        if any(unexpected):
            raise _changed_inside(unexpected, step)
        if odd := _odd(trained):
            raise TrainingError(
                f"The ranks train different parameters at step {step}: {_describe(odd, trained)}. Change requires_grad "
                "in the same way on every rank; callbacks run on all ranks."
            )
        if odd := _odd([names or () for names in graded]):
            raise TrainingError(
                f"Only some ranks have a gradient for the same parameter at step {step}: {_describe(odd, graded)}. The "
                "workers all-reduce the gradients that autograd computes in training_step. Do not set or clear `.grad`."
            )
        sums = [{name: int(checksums([tensor])[0]) for name, tensor in own.weights}]
        sums = self._runtime.gather(sums[0])
        odd = [name for name in sums[0] if any(other[name] != sums[0][name] for other in sums)]
        if not odd:
            return
        ranks = [rank for rank, other in enumerate(sums) if any(other[name] != sums[0][name] for name in odd)]
        if len(set(self._kinds)) > 1 and self._even_out(own, odd):
            return
        raise TrainingError(
            f"The workers' copies of the model differ at step {step}: {abbreviated(odd)} of rank "
            f"{', '.join(map(str, ranks))} {'differs' if len(odd) == 1 else 'differ'} from rank 0. A callback may "
            "change weights on some ranks only, or training_step may compute gradients itself, which the workers do "
            "not all-reduce. Make callbacks act in the same way on every rank, and return the loss from training_step."
        )

    def _even_out(self, own: Copy, odd: Sequence[str]) -> bool:
        """Copy rank 0's weights to all ranks. Return whether they differed by rounding only."""
        weights = dict(own.weights)
        apart = torch.zeros(1, dtype=torch.float64)
        for name in odd:
            theirs = weights[name].contiguous().clone()
            content = theirs.reshape(-1).view(torch.uint8)
            dist.broadcast(content, src=0, group=self._runtime.group_of(content))
            most = (theirs - weights[name]).abs().max() / theirs.abs().max().clamp(min=1e-30)
            apart = torch.maximum(apart, most.double().cpu())
            weights[name].copy_(theirs)
        self._runtime.add_up(apart)
        if not bool(apart <= _LAST_BITS * self._runtime.world_size):
            return False
        if not self._noted:
            self._noted = True
            kinds = ", ".join(dict.fromkeys(self._kinds))
            self._note(
                f"The workers have different devices ({kinds}), which round differently. At each log, rank 0's weights "
                "are copied to all workers if they differ by rounding."
            )
        return True


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the checksum of each tensor, int64 (K,): the sum of its bits as integers, exact in any order."""
    sums = [_integers(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor in memory order as the widest integers that its size allows, the fastest to sum."""
    tensor = as_real(tensor)
    if tensor.is_contiguous():
        flat = tensor.view(-1)
    elif tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        flat = tensor.permute(0, 2, 3, 1).reshape(-1)
    else:
        flat = tensor.reshape(-1)
    nbytes, offset = flat.numel() * flat.element_size(), flat.storage_offset() * flat.element_size()
    kind = next(kind for kind in _INTEGERS if nbytes % kind.itemsize == 0 and offset % kind.itemsize == 0)
    return flat.view(kind)


def _digest(names: Sequence[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


def _odd(sets: Sequence[Sequence[str]]) -> list[str]:
    """Return the names that only some of the ranks have."""
    return sorted({name for own in sets for name in set(own) ^ set(sets[0])})


def _describe(names: Sequence[str], sets: Sequence[Sequence[str] | None]) -> str:
    having = [str(rank) for rank, own in enumerate(sets) if names[0] in (own or ())]
    return f"{abbreviated(names)} on rank {', '.join(having)} only"


def abbreviated(names: Sequence[str]) -> str:
    """Return the first names and the number of further names, for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _changed_inside(sets: Sequence[Sequence[str]], step: int) -> TrainingError:
    names = sorted({name for own in sets for name in own})
    ranks = ", ".join(str(rank) for rank, own in enumerate(sets) if own)
    return TrainingError(
        f"requires_grad of {abbreviated(names)} has changed inside a step, by step {step} on rank {ranks}. The "
        "optimizer and the gradient reduction cannot follow that. Change it between steps, in on_start, on_step or "
        "on_evaluate of a callback (see docs/extending.md)."
    )
