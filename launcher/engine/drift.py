"""Finds workers whose copies of the model are no longer the same.

At each log the workers compare, in one small message, checksums of the trained weights (their bits as integers), which
parameters are trained, and which have gradients. Where something differs, a second look finds the parameters and the
ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.runtime import Runtime
from launcher.errors import TrainingError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_LAST_BITS = 1e-3  # of a parameter's largest weight: what GPUs of different models may differ by
_NAMED = 3


@dataclass(frozen=True)
class Copy:
    """What one rank compares.

    Attributes:
        weights: (name, tensor) of everything that must be the same on all ranks.
        trained: names of the parameters that are trained.
        graded: names of those that have a gradient; None where each rank may have its own.
        unexpected: names of those whose `requires_grad` has changed inside a step.
    """

    weights: Sequence[tuple[str, Tensor]]
    trained: Sequence[str]
    graded: Sequence[str] | None
    unexpected: Sequence[str]


class Drift:
    """Compares the ranks' copies of a model.

    Args:
        kinds: the model of each rank's device. Where they are not all the same, their last bits may differ.
        note: takes the line that says so.
    """

    def __init__(self, runtime: Runtime, kinds: Sequence[str], note: Callable[[str], None]) -> None:
        self._runtime, self._kinds, self._note = runtime, kinds, note
        self._noted = False

    @torch.no_grad()
    def check(self, own: Copy, step: int) -> None:
        """Compare; every rank calls it, after the same step.

        Raises:
            TrainingError: the copies differ, or the set of trained parameters has changed inside a step; names
                parameters, ranks and step. The same on every rank.
        """
        if self._runtime.alone:
            if own.unexpected:
                raise _changed_inside([own.unexpected], step)
            return
        facts = [_number(own.trained), _number(own.graded or ()), _number(own.unexpected)]
        numbers = torch.cat([checksums([tensor for _, tensor in own.weights]).cpu(), torch.tensor(facts)])
        # Where the largest and the smallest are the same, all are. One that is not expected is seen though all have it.
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
                f"The ranks train different parameters at step {step}: {_words(odd, trained)}. Change requires_grad on "
                "every rank alike: callbacks run on all of them."
            )
        if odd := _odd([names or () for names in graded]):
            raise TrainingError(
                f"Only some ranks have a gradient for the same parameter at step {step}: {_words(odd, graded)}. The "
                "workers add up the gradients that autograd computes in training_step; do not set or clear `.grad` "
                "yourself."
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
            f"The workers' copies of the model differ at step {step}: {_listed(odd)} of rank "
            f"{', '.join(map(str, ranks))} {'is' if len(odd) == 1 else 'are'} not what rank 0 has. Something changes "
            "weights or gradients on some ranks only: a callback that is not the same on every rank, or gradients that "
            "training_step computes itself and that the workers therefore do not add up."
        )

    def _even_out(self, own: Copy, odd: Sequence[str]) -> bool:
        """Give all ranks rank 0's weights, where they differ in the last bits alone. Returns whether they did."""
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
                f"The workers' devices are of different kinds ({kinds}), which round differently: where their weights "
                "differ in the last bits, all take those of rank 0 at each log."
            )
        return True


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return one integer for each tensor (K,), the sum of its bits read as integers: any order of adding gives it."""
    sums = [_integers(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as the widest integers that its size allows, in the order in which memory has them.

    The widest are the quickest by far to add up.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_contiguous():
        flat = tensor.view(-1)
    elif tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        flat = tensor.permute(0, 2, 3, 1).reshape(-1)
    else:
        flat = tensor.reshape(-1)
    nbytes, offset = flat.numel() * flat.element_size(), flat.storage_offset() * flat.element_size()
    kind = next(kind for kind in _INTEGERS if nbytes % kind.itemsize == 0 and offset % kind.itemsize == 0)
    return flat.view(kind)


def _number(names: Sequence[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


def _odd(sets: Sequence[Sequence[str]]) -> list[str]:
    """Return the names that some of the ranks have and others do not."""
    return sorted({name for own in sets for name in set(own) ^ set(sets[0])})


def _words(names: Sequence[str], sets: Sequence[Sequence[str] | None]) -> str:
    having = [str(rank) for rank, own in enumerate(sets) if names[0] in (own or ())]
    return f"{_listed(names)} on rank {', '.join(having)} only"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _changed_inside(sets: Sequence[Sequence[str]], step: int) -> TrainingError:
    names = sorted({name for own in sets for name in own})
    ranks = ", ".join(str(rank) for rank, own in enumerate(sets) if own)
    return TrainingError(
        f"requires_grad of {_listed(names)} has changed inside a step, by step {step} on rank {ranks}: the optimizer "
        "and the workers, who add up gradients, do not know of it. Change it between two steps, in on_start, on_step "
        "or on_evaluate of a callback (see docs/extending.md)."
    )
