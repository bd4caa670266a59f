"""Calls the step methods of the model; a `training_step` with a second parameter also gets the position of the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.engine.tensors import as_real


@dataclass(frozen=True)
class StepInfo:
    """The second argument of `training_step(batch, step)`.

    Attributes:
        step: number of the optimizer step that the batch belongs to, from 1, as on the x axis of TensorBoard.
        epoch: number of the epoch, from 0.
        total_steps: number of optimizer steps of the run.
        rank: number of this worker, from 0.
        world_size: number of workers.
    """

    step: int = 1
    epoch: int = 0
    total_steps: int = 1
    rank: int = 0
    world_size: int = 1

    @classmethod
    def following(cls, progress: Progress, total_steps: int, runtime: Runtime) -> StepInfo:
        """Return the facts of the step that follows `progress`."""
        return cls(progress.step + 1, progress.epoch, total_steps, runtime.rank, runtime.world_size)

    @classmethod
    def last(cls, progress: Progress, total_steps: int, runtime: Runtime) -> StepInfo:
        """Return the facts of the last step before `progress`, which is the one that validation after it gets."""
        epoch = progress.epoch if progress.batch or not progress.epoch else progress.epoch - 1
        return cls(max(1, progress.step), epoch, total_steps, runtime.rank, runtime.world_size)


def takes_step(model: nn.Module) -> bool:
    """Whether `training_step` has a second parameter for the step: a required one, or one with the name `step`."""
    try:
        parameters = list(inspect.signature(model.training_step).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].name == "step" or positional[1].default is inspect.Parameter.empty)


def call_training_step(
    model: nn.Module, batch: Any, info: StepInfo, cast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Any:
    """Return the result of the model's `training_step` for a batch.

    Args:
        cast: returns the autocast context in which the network computes.
    """
    with cast():
        if takes_step(model):
            return model.training_step(batch, info)  # type: ignore[operator]
        return model.training_step(batch)  # type: ignore[operator]


class Steps(nn.Module):
    """Calls the model's step methods through `forward`, so that hooks of wrappers (DDP, FSDP) run.

    Attributes:
        used: the parameters that had a gradient in every batch so far.
        needed: the parameters that get a zero gradient on a rank without samples, for which the other ranks wait.
        takes_step: whether `training_step` gets `info` as its second argument.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.used: list[nn.Parameter] = []
        self.needed: list[nn.Parameter] = []
        self.takes_step, self.info = takes_step(model), StepInfo()

    def forward(self, batch: Any, method: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        if method is not None:
            return method(self.model, batch)
        if batch is None:  # no samples on this rank: zero loss, which still runs the hooks of gradients on other ranks
            return {"loss": (sum(as_real(p).sum() * 0.0 for p in self.needed), 0.0)}
        if self.takes_step:
            return self.model.training_step(batch, self.info)  # type: ignore[operator]
        return self.model.training_step(batch)  # type: ignore[operator]
