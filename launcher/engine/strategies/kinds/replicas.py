"""The common base of `local_sgd` and `diloco`, whose workers synchronize every few steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from launcher.config.checks import at_least
from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import Link, Step, predict_rare
from launcher.engine.strategies.kinds.base import Network, StrategyKind, narrowing, option
from launcher.errors import ConfigError
from launcher.formatting import size

if TYPE_CHECKING:
    from torch import nn

    from launcher.engine.order import Split
    from launcher.engine.runtime import Runtime
    from launcher.engine.strategies.strategy import Strategy


class ReplicasKind(StrategyKind):
    """Workers hold different weights; an outer optimizer synchronizes them every `inner_steps` steps."""

    exact = False
    diverges = True

    @abstractmethod
    def outer(self, config: StrategyConfig) -> tuple[float, float]:
        """Return the learning rate and the momentum of the outer optimizer."""

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        super().check(config, trainer)
        for key, least in (("inner_steps", 1), ("overlap_steps", 0)):
            if (value := getattr(config, key)) is not None:
                at_least(f"strategy.{key}", value, least)
        if option(config, "overlap_steps") >= option(config, "inner_steps"):
            raise ConfigError(
                f"strategy.overlap_steps is {config.overlap_steps}, but must be below strategy.inner_steps="
                f"{option(config, 'inner_steps')}, because an all-reduce must end before the next one starts.",
                key="strategy.overlap_steps",
            )

    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        from launcher.engine.strategies.replicas import Replicas

        return Replicas(model, runtime, trainer, config, *self.outer(config))

    def memory(self, config: StrategyConfig, workers: int, whole: Mapping[str, int]) -> dict[str, int]:
        _, momentum = self.outer(config)
        return {**whole, "outer": whole["gradients"] * (2 if momentum > 0 else 1)}

    def traffic(
        self, config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, passes: int
    ) -> tuple[int, str]:
        gradients, every = gradient_bytes // narrowing(config), option(config, "inner_steps")
        return gradients // every, f"{size(gradients)} of differences every {every} steps"

    def step(
        self, config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link
    ) -> Step:
        return predict_rare(
            compute, network.gradients / narrowing(config), workers, link, option(config, "inner_steps")
        )
