"""`strategy=ddp`: every worker holds the whole network, and gradients are averaged in each step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from launcher.config.checks import above_zero, at_least
from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import Link, Step, predict
from launcher.engine.strategies.kinds.base import Network, StrategyKind, option, register
from launcher.errors import ConfigError
from launcher.formatting import size

if TYPE_CHECKING:
    from torch import nn

    from launcher.engine.order import Split
    from launcher.engine.runtime import Runtime
    from launcher.engine.strategies.strategy import Strategy


@register
class Ddp(StrategyKind):
    """Data parallelism, with PowerSGD if `strategy.compression=powersgd`."""

    name = "ddp"
    position = 0
    options = MappingProxyType({"static_graph": False, "bucket_mb": 25.0, "powersgd_rank": 4, "powersgd_after": 10})
    deterministic = True
    checkpoint_form = "whole"
    checkpoint_options = ("powersgd_rank",)

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        for key, least in (("powersgd_rank", 1), ("powersgd_after", 0)):
            if (value := getattr(config, key)) is None:
                continue
            if config.compression != "powersgd":
                raise ConfigError(
                    f"strategy.{key} needs strategy.compression=powersgd. Add it, or remove {key}.",
                    key=f"strategy.{key}",
                )
            at_least(f"strategy.{key}", value, least)
        if config.bucket_mb is not None:
            above_zero("strategy.bucket_mb", config.bucket_mb)

    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        if config.compression == "powersgd":
            from launcher.engine.strategies.powersgd import PowerSGDParallel

            return PowerSGDParallel(model, runtime, trainer, config)
        from launcher.engine.strategies.ddp import DataParallel

        return DataParallel(model, runtime, trainer, config)

    def memory(self, config: StrategyConfig, workers: int, whole: Mapping[str, int]) -> dict[str, int]:
        if config.compression == "powersgd":
            return {**whole, "left out": whole["gradients"]}  # upper bound: only compressed matrices have errors
        return dict(whole)

    def traffic(
        self, config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, passes: int
    ) -> tuple[int, str]:
        if config.compression != "powersgd":
            return super().traffic(config, trainer, parameter_bytes, gradient_bytes, passes)
        rank = option(config, "powersgd_rank")
        text = f"gradients as matrices of rank {rank} (whole they are {size(gradient_bytes)}) a step"
        return gradient_bytes, text

    def advises(self, config: StrategyConfig) -> bool:
        return config.compression != "powersgd"  # the bytes depend on the shapes of the weights

    def step(
        self, config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link
    ) -> Step:
        if config.compression == "powersgd":  # starts after the backward pass
            return predict(compute, network.powersgd, workers, link, overlap=0.0)
        return super().step(config, precision, network, compute, workers, link)
