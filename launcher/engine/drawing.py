"""Traces the training step for TensorBoard's picture of the network."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import nn

from launcher.engine.batches import leaves, tree_map
from launcher.engine.preserve import preserve_model


class TrainingStep(nn.Module):
    """The model's training step as a function of the batch's tensors, since tracing knows neither numbers nor text
    beside them, that returns a tensor. The drawing is named after this class."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.model, self._batch = model, batch
        self.tensors = tuple(leaves(batch))

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        following = iter(tensors)
        batch = tree_map(lambda _: next(following), self._batch)
        loss = self.model.training_step(batch)["loss"]  # type: ignore[operator]
        return loss[0] if isinstance(loss, tuple) else loss


def traced_step(model: nn.Module, batch: Any, device: torch.device) -> tuple[Any, tuple[torch.Tensor, ...]] | None:
    """Return the traced training step and its arguments, or None where the model cannot be traced.

    `training_step` is called once, in evaluation mode. Every rank traces, though rank 0 alone draws: a training step
    may contain collectives. The model is as before afterwards.
    """
    with warnings.catch_warnings(), preserve_model(model, device), torch.no_grad(), quietly():
        warnings.simplefilter("ignore")
        try:
            step = TrainingStep(model, batch).eval()
            return torch.jit.trace(step, step.tensors, strict=False, check_trace=False), step.tensors
        # Tracing runs the user's code under a tracer: any failure there says only that the picture cannot be drawn.
        except Exception:
            return None


def quietly() -> contextlib.AbstractContextManager[Any]:
    """Drop what is printed: the user's prints have been shown by the step itself, and torch prints the batch."""
    return contextlib.redirect_stdout(io.StringIO())
