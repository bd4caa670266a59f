"""Traces the training step for the graph of the network in TensorBoard."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import nn

from launcher.engine.batches import leaves, tree_map
from launcher.engine.preserve import preserve_model
from launcher.engine.steps import StepInfo, call_training_step


class TrainingStep(nn.Module):
    """The model's training step as a function of tensors that returns a tensor, as tracing requires.

    Numbers and text of the batch are constants of the trace. The name of this class is the title of the graph.
    """

    def __init__(self, model: nn.Module, batch: Any, info: StepInfo) -> None:
        super().__init__()
        self.model, self._batch, self._info = model, batch, info
        self.tensors = tuple(leaves(batch))

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        following = iter(tensors)
        batch = tree_map(lambda _: next(following), self._batch)
        loss = call_training_step(self.model, batch, self._info)["loss"]
        return loss[0] if isinstance(loss, tuple) else loss


def traced_step(
    model: nn.Module | None, batch: Any, device: torch.device, info: StepInfo | None = None
) -> tuple[Any, tuple[torch.Tensor, ...]] | None:
    """Return the traced training step and its arguments, or None if the model is None or cannot be traced.

    The model is restored afterwards.
    `training_step` is called once, in evaluation mode. Every rank must call this function, although only rank 0 uses
    the result: the training step may contain collectives.
    """
    if model is None:
        return None
    with warnings.catch_warnings(), preserve_model(model, device), torch.no_grad(), quietly():
        warnings.simplefilter("ignore")
        try:
            step = TrainingStep(model, batch, info or StepInfo()).eval()
            return torch.jit.trace(step, step.tensors, strict=False, check_trace=False), step.tensors
        # A failure under the tracer is not an error of the training step: only the graph is missing.
        except Exception:
            return None


def quietly() -> contextlib.AbstractContextManager[Any]:
    """Discard output: the user's prints were shown by the step itself, and torch prints the batch."""
    return contextlib.redirect_stdout(io.StringIO())
