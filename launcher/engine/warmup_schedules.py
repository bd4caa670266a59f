"""Learning-rate schedules over the whole run that begin with a linear warm-up."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from launcher.errors import ConfigError


class _Warmup(LambdaLR):
    """Increases the learning rate linearly, then multiplies it by `ratio(done)`.

    Args:
        total_steps: number of optimizer steps of the whole run.
        warmup_ratio: length of the linear warm-up as a fraction of the run, 0 to 1.
        warmup_steps: length of the warm-up in steps; overrides `warmup_ratio`.
        ratio: maps the number of steps since the warm-up, and the number of steps after it, to a factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_ratio: float,
        warmup_steps: int | None,
        ratio: Callable[[int, int], float],
    ) -> None:
        warmup = steps_of("warmup", warmup_ratio, warmup_steps, total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            length = max(1, total_steps - warmup)
            return ratio(min(step - warmup, length), length)

        super().__init__(optimizer, factor)


class _WarmupDecay(_Warmup):
    """Increases the learning rate linearly, then decreases it until the end of the run.

    Args:
        total_steps: number of optimizer steps of the whole run.
        warmup_ratio: length of the linear warm-up as a fraction of the run, 0 to 1.
        warmup_steps: length of the warm-up in steps; overrides `warmup_ratio`.
        min_ratio: final learning rate as a fraction of the learning rate, 0 to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        shape = type(self).shape

        def ratio(step: int, length: int) -> float:
            return min_ratio + (1 - min_ratio) * shape(step / length)

        super().__init__(optimizer, total_steps, warmup_ratio, warmup_steps, ratio)

    @staticmethod
    @abstractmethod
    def shape(done: float) -> float:
        """Return the part of the decrease that is left, from 1 to 0, after a fraction of the steps, 0 to 1."""


class WarmupCosine(_WarmupDecay):
    """Decreases the learning rate along a cosine (Loshchilov & Hutter 2017), after a linear warm-up."""

    @staticmethod
    def shape(done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))


class WarmupLinear(_WarmupDecay):
    """Decreases the learning rate linearly, as for fine-tuning BERT (Devlin et al. 2019), after a linear warm-up."""

    @staticmethod
    def shape(done: float) -> float:
        return 1 - done


class WarmupStableDecay(_Warmup):
    """Increases the learning rate linearly, keeps it, and decreases it at the end of the run (Hu et al. 2024, MiniCPM).

    The decay is 1 - sqrt(t), which gave the lowest losses in Hägele et al. 2024 (arXiv:2405.18392).

    Args:
        total_steps: number of optimizer steps of the whole run.
        warmup_ratio, decay_ratio: lengths of the warm-up and of the decay as fractions of the run, together at most 1.
        warmup_steps, decay_steps: the lengths in steps; they override the fractions.
        min_ratio: final learning rate as a fraction of the learning rate, 0 to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        decay_ratio: float = 0.2,
        decay_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        decay = steps_of("decay", decay_ratio, decay_steps, total_steps)
        warmup = steps_of("warmup", warmup_ratio, warmup_steps, total_steps)
        if warmup + decay > total_steps:
            raise ConfigError(
                f"The warm-up of {warmup} steps and the decay of {decay} steps are longer than the {total_steps} steps "
                "of the run. Reduce scheduler.warmup_steps or scheduler.decay_steps.",
                key="scheduler.decay_steps",
            )

        def ratio(step: int, length: int) -> float:
            done = step - (length - decay)
            return 1.0 if done <= 0 else min_ratio + (1 - min_ratio) * (1 - math.sqrt(done / decay))

        super().__init__(optimizer, total_steps, warmup_ratio, warmup_steps, ratio)


def steps_of(name: str, ratio: float, steps: int | None, total_steps: int) -> int:
    """Return the length of a part of the run in steps.

    Raises:
        ConfigError: it is negative, or longer than the run.
    """
    if not 0 <= ratio <= 1:
        key = f"scheduler.{name}_ratio"
        raise ConfigError(f"{key}={ratio} must be a fraction of the run between 0 and 1.", key=key)
    if steps is None:
        return round(ratio * total_steps)
    if not 0 <= steps <= total_steps:
        key = f"scheduler.{name}_steps"
        raise ConfigError(f"{key}={steps} must be between 0 and the {total_steps} steps of the run.", key=key)
    return steps
