"""What the model shows of itself in TensorBoard: `examples(batch)`, on rank 0, at every evaluation."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from launcher.engine.preserve import preserve_model
from launcher.engine.randomness import seed_everything
from launcher.errors import UserCodeError

Show = Callable[[Mapping[str, Any]], None]


class Examples:
    """Asks the model for examples of a validation batch and hands them on.

    A failure is told once and ends nothing: hours of training are worth more than a picture. The model is not asked
    again in this process.

    Args:
        show: takes {tag: picture, (audio, rate), text or figure}; raises ValueError for anything else.
        tell: takes a line for the user.
        seed: random numbers in `examples` begin with it each time, so that pictures can be compared; those of training
            are not touched.
    """

    def __init__(self, model: nn.Module, show: Show, tell: Callable[[str], None], seed: int) -> None:
        self._model = model
        self._function = getattr(model, "examples", None)
        self._show, self._tell, self._seed = show, tell, seed

    def look(self, prefix: str, batch: Any, metrics: Collection[str]) -> None:
        """Show the examples of a batch under `<prefix><name>`. The model is in evaluation mode, without gradients.

        Args:
            metrics: names that are taken, since TensorBoard keeps one kind of thing under a tag.
        """
        if self._function is None:
            return
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        try:
            with preserve_model(self._model, device), torch.no_grad():
                seed_everything(self._seed)
                answer = self._function(batch)
            if not isinstance(answer, Mapping):
                raise UserCodeError(f"it must return a mapping of names to examples; found a {_kind(answer)}", "")
            for name in answer.keys() & set(metrics):
                raise UserCodeError(f"{name} is the name of a metric, and cannot be that of an example too", "")
            self._show({f"{prefix}{name}": value for name, value in answer.items()})
        except Exception as error:
            self._function = None
            frames = traceback.extract_tb(error.__traceback__)
            what = str(error) if isinstance(error, (UserCodeError, ValueError)) else f"{_kind(error)}: {error}"
            where = "" if isinstance(error, UserCodeError) else f" ({frames[-1].filename}, line {frames[-1].lineno})"
            self._tell(f"The model's `examples` failed and are left out from now on: {what}{where}.")


def _kind(value: Any) -> str:
    return type(value).__name__
