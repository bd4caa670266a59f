"""`strategy=diloco`: workers train independently; their mean weight change is the gradient of an outer optimizer."""

from __future__ import annotations

from types import MappingProxyType

from launcher.config.checks import above_zero
from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.strategies.kinds.base import option, register
from launcher.engine.strategies.kinds.replicas import ReplicasKind
from launcher.errors import ConfigError


@register
class Diloco(ReplicasKind):
    """DiLoCo (Douillard et al. 2023), with Nesterov momentum.

    The paper uses an outer momentum of 0.9 for hundreds of synchronizations; with tens of them it overshoots
    (docs/log.md).
    """

    name = "diloco"
    position = 3
    options = MappingProxyType({"inner_steps": 20, "overlap_steps": 0, "outer_lr": 0.7, "outer_momentum": 0.3})
    checkpoint_options = tuple(options)

    def outer(self, config: StrategyConfig) -> tuple[float, float]:
        return option(config, "outer_lr"), option(config, "outer_momentum")

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        super().check(config, trainer)
        if config.outer_lr is not None:
            above_zero("strategy.outer_lr", config.outer_lr)
        if config.outer_momentum is not None and not 0 <= config.outer_momentum < 1:
            raise ConfigError(
                f"strategy.outer_momentum is {config.outer_momentum}, but must be at least 0 and below 1.",
                key="strategy.outer_momentum",
            )
