"""Detects losses and gradients that are NaN or infinite, in the step and on the rank where they occur.

On the CPU every loss is checked at once. On a GPU that would synchronize the device in every step: the number of the
first bad step is stored on the device and read at the next log. Of the gradients, each step checks the smallest ones,
up to `Strategy.PROBED` numbers in total (all of a small network): a NaN also reaches the biases in the backward pass.
Other bad gradients are detected in the next loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from launcher.engine.metrics import as_pair
from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Runtime
from launcher.engine.steps import call_training_step
from launcher.engine.strategies.strategy import Strategy, loss_of
from launcher.errors import NonFiniteLoss

_NEVER = 2**62


class Finite:
    """Checks the losses and gradients of one rank.

    Args:
        again: reads this rank's microbatches of the current step again; None if they cannot be read twice.
        describe_checkpoint: returns the part of a message that names the last good checkpoint; a collective.
    """

    def __init__(
        self,
        runtime: Runtime,
        strategy: Strategy,
        again: Callable[[], Iterable[Any]] | None,
        describe_checkpoint: Callable[[], str],
    ) -> None:
        self._runtime, self._strategy, self._again = runtime, strategy, again
        self._describe_checkpoint = describe_checkpoint
        self._on_gpu = runtime.device.type != "cpu"
        # The first bad step, on the device.
        self._losses: Tensor | int = torch.full((), _NEVER, device=runtime.device) if self._on_gpu else _NEVER
        self._gradients: Tensor | int = torch.full((), _NEVER, device=runtime.device) if self._on_gpu else _NEVER
        self._name: str | None = None

    @property
    def gradient_was_bad(self) -> bool:
        """Whether a gradient of this rank was bad, which the next vote reports to the other ranks."""
        return not self._on_gpu and self._gradients < _NEVER  # type: ignore[return-value]

    def note_loss(self, answer: Any, step: int) -> None:
        """Record the step on the device if the loss is not finite."""
        if self._on_gpu:
            loss, _ = as_pair("loss", answer["loss"])
            self._losses = _earlier(self._losses, torch.isfinite(loss.detach()), step)

    def note_gradients(self, step: int) -> bool:
        """Check the gradients of the step before they are applied.

        Returns whether the gradients are bad on all ranks, so that no rank may apply them.
        """
        finite = self._strategy.gradients_are_finite()
        if finite is None:
            return False
        if self._on_gpu:
            self._gradients = _earlier(self._gradients, finite, step)
            return False
        if finite or self.gradient_was_bad:
            return False
        self._gradients = step
        alike = self._runtime.alone or self._strategy.reduces_while_computing
        self._name = self._recompute() if alike else self._strategy.bad_gradient()
        return alike

    def fail(self, step: int, loss_is_bad: bool = False, gradient_is_bad: bool = False) -> NoReturn:
        """Raise the error that names the first bad loss or gradient and its ranks. A collective.

        Args:
            step: the current step, in which this rank's loss or gradient may be bad.
        """
        checkpoint = self._describe_checkpoint()
        error = self._first_error(step, loss_is_bad, gradient_is_bad, checkpoint)
        raise error or NonFiniteLoss(f"The loss became NaN or infinite at an unknown step; {checkpoint}.")

    def check_totals(self, totals: Mapping[str, tuple[Tensor, float]], step: int) -> None:
        """Raise NonFiniteLoss on every rank if the sum of the loss over an interval and all ranks is not finite."""
        if not math.isfinite(float(totals["loss"][0])):
            self.fail(step + 1)

    def check_weights(self, step: int) -> None:
        """Raise NonFiniteLoss on every rank if a weight is not finite.

        A gradient may be infinite although the loss is finite. This check prevents a checkpoint with such weights; the
        next loss would show the problem too late.
        """
        if self._strategy.is_finite():
            return
        checkpoint = self._describe_checkpoint()
        raise self._first_error(step, False, False, checkpoint) or NonFiniteLoss(
            f"The weights became NaN or infinite by step {step}, while the loss was finite; {checkpoint}. Lower "
            "optimizer.lr, or check training_step for a square root, a logarithm or a division at zero."
        )

    def _first_error(
        self, step: int, loss_is_bad: bool, gradient_is_bad: bool, checkpoint: str
    ) -> NonFiniteLoss | None:
        """Return the error that names the first bad loss or gradient, the same on every rank, or None."""
        losses, gradients = int(self._losses), int(self._gradients)
        if loss_is_bad:
            losses = min(losses, step)
        if gradient_is_bad:
            gradients, self._name = min(gradients, step), self._name or self._strategy.bad_gradient()
        everyone = self._runtime.gather((losses, gradients, self._name))
        first = min(min(losses, gradients) for losses, gradients, _ in everyone)
        if first == _NEVER:
            return None
        in_loss = [rank for rank, (loss, _, _) in enumerate(everyone) if loss == first]
        if in_loss:
            # A bad loss has a bad gradient in the same step, on every rank that takes part in the sum.
            where = ", ".join(f"step {first} on rank {rank}" for rank in in_loss)
            advice = (
                "Lower optimizer.lr, set trainer.clip_norm=1, or check the data for bad samples"
                if first > 1
                else "It is the first step: check the data for bad samples, and training_step for a division by zero"
            )
            return NonFiniteLoss(f"The loss became NaN or infinite at {where}; {checkpoint}. {advice}.")
        named = {rank: name for rank, (_, bad, name) in enumerate(everyone) if bad == first and name}
        name = next(iter(named.values()), None)
        what = f"The gradient of {name}" if name else "A gradient"
        where = ", ".join(f"step {first} on rank {rank}" for rank in named) or f"step {first}"
        return NonFiniteLoss(
            f"{what} became NaN or infinite at {where}, while the loss was finite; {checkpoint}. Check training_step "
            "for a square root, a logarithm or a division at zero, whose derivative is infinite; "
            "torch.autograd.set_detect_anomaly(True) in the model's constructor names the operation."
        )

    def _recompute(self) -> str | None:
        """Return the name of the parameter with a bad gradient for the samples of this rank, or None."""
        if self._again is None:
            return None
        strategy = self._strategy
        parameters = [(name, p) for name, p in strategy.model.named_parameters() if p.requires_grad]
        with preserve_model(strategy.model, self._runtime.device):
            for batch in self._again():
                with strategy.cast():
                    loss, _ = loss_of(call_training_step(strategy.model, batch, strategy.info))
                grads = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
                for (name, _), grad in zip(parameters, grads, strict=True):
                    if grad is not None and not bool(torch.isfinite(grad.to_dense()).all()):
                        return name
        return None


def _earlier(known: Tensor | int, finite: Tensor | bool, step: int) -> Tensor:
    assert isinstance(known, Tensor)
    assert isinstance(finite, Tensor)
    return torch.minimum(known, torch.where(finite, _NEVER, step))
