"""`strategy=auto`: the fastest strategy with the losses of `ddp`; see `launcher.engine.auto_strategy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.strategies.kinds.base import StrategyKind, register
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from launcher.engine.order import Split
    from launcher.engine.runtime import Runtime
    from launcher.engine.strategies.strategy import Strategy


@register
class Auto(StrategyKind):
    """Chooses `ddp`, or `fsdp` if the network does not fit on a worker. Before the choice it is built as `ddp`."""

    name = "auto"
    position = 4
    deterministic = True
    chooses = True
    checkpoint_form = "whole"
    plan_note = " (at the start: ddp, or fsdp if the network does not fit on a worker; these figures are those of ddp)"

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        if config.compression != "none":
            raise ConfigError(
                f"strategy=auto chooses among strategies with the losses of ddp, but strategy.compression="
                f"{config.compression} changes the losses. Name a strategy, or remove strategy.compression.",
                key="strategy.compression",
            )

    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        from launcher.engine.strategies.ddp import DataParallel

        return DataParallel(model, runtime, trainer)
