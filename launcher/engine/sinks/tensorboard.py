"""TensorBoard's event file, written by rank 0 alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


class TensorBoard:
    """Writes the run's scalars, its configuration, its graph and its hyperparameters into one event file.

    Args:
        directory: the run's directory.
        purge_step: first step whose earlier values TensorBoard shall forget; set on resume.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        # Imported here: TensorBoard takes about a second, which the first step need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=30)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def configuration(self, yaml: str) -> None:
        """Show the configuration as text, indented so that Markdown keeps it as code."""
        self._writer.add_text("configuration", "\n".join(f"    {line}" for line in yaml.splitlines()), 0)

    def hyperparameters(self, values: Mapping[str, Any], metric: str) -> None:
        """Fill the HParams tab. The three summaries go into this file: `add_hparams` would open another run."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values.items()}
        for summary in hparams(plain, {metric: 0.0}):
            self._writer.file_writer.add_summary(summary)  # type: ignore[union-attr]

    def graph(self, model: nn.Module, batch: Any) -> bool:
        """Draw the network when it can be traced; tell whether it could. Training goes on either way."""
        with warnings.catch_warnings(), torch.random.fork_rng([]), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                from torch.utils.tensorboard._pytorch_graph import graph

                definition = graph(_Traceable(model), (batch,), use_strict_trace=False)
                self._writer.file_writer.add_graph(definition)  # type: ignore[union-attr]
            # Tracing runs the user's code under a tracer: any failure there says only that the picture cannot be drawn.
            except Exception:
                return False
        return True

    def close(self) -> None:
        self._writer.close()


class _Traceable(nn.Module):
    """The model's training step as a `forward` that returns tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        loss = self.model.training_step(batch)["loss"]  # type: ignore[operator]
        return loss[0] if isinstance(loss, tuple) else loss
