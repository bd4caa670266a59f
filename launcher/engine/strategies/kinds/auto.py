"""`strategy=auto`: the quickest strategy with the same losses, chosen at the start; see `engine.auto_strategy`."""

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
    """A choice between `ddp` and, where a worker cannot hold the network, `fsdp`. Without a choice it is `ddp`."""

    name = "auto"
    position = 4
    deterministic = True
    chooses = True
    checkpoint_form = "whole"
    plan_note = (
        " (at the start: ddp, or fsdp where a worker cannot hold the network; the figures here are those of ddp)"
    )

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        if config.compression != "none":
            raise ConfigError(
                f"strategy=auto chooses among strategies with the losses of ddp, and strategy.compression="
                f"{config.compression} changes them. Name the strategy, or leave the compression out."
            )

    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        from launcher.engine.strategies.ddp import DataParallel

        return DataParallel(model, runtime, trainer)
