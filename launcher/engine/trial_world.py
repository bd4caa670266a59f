"""A fake process group of all workers, for testing a model that calls `torch.distributed` in one process.

The start check runs before any worker exists, so such a model needs a group. Under torchrun it must not be the real
group, whose other ranks do not take part. Every collective of the fake group is recorded and returns at once. The data
of the other workers is what this process sent at the same position of an earlier pass, or what it sends now.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A recorded collective: its name, and copies of the tensors that this worker sent."""

    name: str
    sent: tuple[Tensor, ...]

    @property
    def form(self) -> tuple[str, tuple[tuple[int, ...], ...]]:
        """The name and the shapes, which must be equal on all workers."""
        return self.name, tuple(tuple(tensor.shape) for tensor in self.sent)


class TrialWorld:
    """Records the model's collectives in each pass.

    Args:
        workers: the world size that the model sees.

    Attributes:
        calls: the collectives of the last pass.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.calls: list[Call] = []
        self._others: Sequence[Call] = ()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the fake group as the default process group inside the context; no effect for one worker."""
        if self.workers == 1 or not dist.is_available():
            yield
            return
        group = _group_class()(self)
        world: Any = dist.distributed_c10d._world
        real = world.default_pg
        world.default_pg, world.pg_map[group], world.pg_names[group] = group, ("gloo", None), "trial"
        try:
            yield
        finally:
            world.default_pg = real
            del world.pg_map[group], world.pg_names[group]

    @contextmanager
    def a_pass(self, others: Sequence[Call] = ()) -> Iterator[None]:
        """Record the collectives inside as one pass. `others`: the collectives of the other workers in it."""
        self.calls, self._others = [], others
        yield

    def record(self, call: Call) -> tuple[Tensor, ...]:
        """Record a collective; return the tensors that each of the other workers sends in it."""
        position = len(self.calls)
        self.calls.append(call)
        if position < len(self._others) and self._others[position].form == call.form:
            return self._others[position].sent
        return call.sent


_REDUCED: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.PRODUCT: operator.mul,
}


def _group_class() -> Callable[[TrialWorld], Any]:
    """Return the class of the fake group. Created on use, because torch may be built without torch.distributed."""

    class TrialGroup(dist.ProcessGroup):
        def __init__(self, world: TrialWorld) -> None:
            super().__init__(0, world.workers)  # type: ignore[call-arg]
            self._trial = world

        def _record(self, name: str, *sent: Tensor) -> tuple[Tensor, ...]:
            return self._trial.record(Call(name, tuple(tensor.detach().clone() for tensor in sent)))

        def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
            for each, own, other in zip(outputs, inputs, self._record("all_gather", *inputs), strict=False):
                for rank, output in enumerate(each):
                    output.copy_(other if rank else own)
            return _done(outputs)

        def _allgather_base(self, output: Any, own: Any, options: Any = None) -> Any:
            (other,) = self._record("all_gather_into_tensor", own)
            parts = [other if rank else own for rank in range(self._trial.workers)]
            output.copy_(torch.cat([part.reshape(-1) for part in parts]).view_as(output))
            return _done(output)

        def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
            return self._allgather_base(output, input)

        def allreduce(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]
            kind = getattr(options, "reduceOp", dist.ReduceOp.SUM)
            combine = next((function for op, function in _REDUCED.items() if kind == op), None)
            for own, other in zip(tensors, self._record("all_reduce", *tensors), strict=True):
                if combine is not None:
                    own.copy_(combine(own, other))
                elif kind == dist.ReduceOp.SUM:
                    own.add_(other * (self._trial.workers - 1))
            return _done(tensors)

        def reduce(self, tensors: Any, *options: Any) -> Any:
            self._record("reduce", *tensors)
            return _done(tensors)

        def broadcast(self, tensors: Any, *options: Any) -> Any:
            self._record("broadcast", *tensors)
            return _done(tensors)

        def gather(self, outputs: Any, inputs: Any, *options: Any) -> Any:
            for each, other in zip(outputs, self._record("gather", *inputs), strict=False):
                for output in each:
                    output.copy_(other)
            return _done(outputs)

        def reduce_scatter(self, outputs: Any, inputs: Any, *options: Any) -> Any:
            self._record("reduce_scatter", *outputs)
            for output, each in zip(outputs, inputs, strict=False):
                output.copy_(each[0])
            return _done(outputs)

        def alltoall(self, outputs: Any, inputs: Any, *options: Any) -> Any:
            self._record("all_to_all", *inputs)
            return _done(outputs)

        def barrier(self, *options: Any) -> Any:
            self._record("barrier")
            return _done(None)

        def getBackendName(self) -> str:
            return "gloo"

    return TrialGroup


def _done(value: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(value)
    return torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]
