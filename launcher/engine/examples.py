"""Shows the result of the model's `examples(batch)` in TensorBoard, on rank 0, at every evaluation."""

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
    """Calls the model's `examples` with a validation batch and passes the result to the sinks.

    An exception does not end the run: it is reported once, and `examples` is not called again in this process.

    Args:
        show: called with {tag: image, (audio, rate), text or figure}; raises ValueError for any other value.
        note: called with a line for the user.
        seed: seeds the random numbers of every call, so that examples of different steps are comparable. The random
            state of training is preserved.
    """

    def __init__(self, model: nn.Module, show: Show, note: Callable[[str], None], seed: int) -> None:
        self._model = model
        self._function = getattr(model, "examples", None)
        self._show, self._note, self._seed = show, note, seed

    def show(self, prefix: str, batch: Any, metrics: Collection[str]) -> None:
        """Show the examples of a batch under `<prefix><name>`. The model is in evaluation mode, without gradients.

        Args:
            metrics: names that an example must not have, since TensorBoard allows one kind of value per tag.
        """
        if self._function is None:
            return
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        try:
            with preserve_model(self._model, device), torch.no_grad():
                seed_everything(self._seed)
                answer = self._function(batch)
            if not isinstance(answer, Mapping):
                raise UserCodeError(
                    f"it must return a mapping of names to examples, but returned a {_kind(answer)}", ""
                )
            for name in answer.keys() & set(metrics):
                raise UserCodeError(f"{name} is the name of a metric; an example needs another name", "")
            self._show({f"{prefix}{name}": value for name, value in answer.items()})
        except Exception as error:
            self._function = None
            frames = traceback.extract_tb(error.__traceback__)
            what = str(error) if isinstance(error, (UserCodeError, ValueError)) else f"{_kind(error)}: {error}"
            where = "" if isinstance(error, UserCodeError) else f" ({frames[-1].filename}, line {frames[-1].lineno})"
            self._note(f"The model's `examples` failed and is not called again: {what}{where}.")


def _kind(value: Any) -> str:
    return type(value).__name__
