"""`strategy=fsdp`: parameters, gradients and optimizer state are sharded over the workers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import Link, Step, predict_sharded
from launcher.engine.strategies.kinds.base import Network, StrategyKind, narrowing, option, register
from launcher.formatting import size

if TYPE_CHECKING:
    from torch import nn

    from launcher.engine.order import Split
    from launcher.engine.runtime import Runtime
    from launcher.engine.strategies.strategy import Strategy


@register
class Fsdp(StrategyKind):
    """Fully sharded data parallelism. A single worker trains without sharding."""

    name = "fsdp"
    position = 1
    options = MappingProxyType({"cpu_offload": False, "hybrid": False})
    divides = True
    takes_sparse = False
    checkpoint_form = "whole"

    def check_model(self, model: nn.Module, config: StrategyConfig) -> None:
        from launcher.engine.strategies.blocks import check_divisible

        check_divisible(model, config.blocks)

    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        if runtime.alone:
            from launcher.engine.strategies.ddp import DataParallel

            return DataParallel(model, runtime, trainer)
        from launcher.engine.strategies.fsdp import FullySharded

        return FullySharded(model, runtime, trainer, config, split)

    def memory(self, config: StrategyConfig, workers: int, whole: Mapping[str, int]) -> dict[str, int]:
        # The first dimension of each tensor is sharded and padded.
        return {name: -(-part // workers) for name, part in whole.items()}

    def memory_on_gpu(
        self, config: StrategyConfig, workers: int, machines: int, whole: Mapping[str, int]
    ) -> dict[str, int]:
        if option(config, "cpu_offload"):
            return {}
        among = max(1, workers // machines) if option(config, "hybrid") else workers
        return self.memory(config, among, whole)

    def traffic(
        self, config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, passes: int
    ) -> tuple[int, str]:
        weights = parameter_bytes // (1 if trainer.precision == "float32" else 2)
        total = (2 * weights + gradient_bytes // narrowing(config)) * passes
        times = f"{passes} microbatches" if passes > 1 else "one microbatch"
        return total, f"{size(total)} of weights and gradients a step ({times})"

    def predicts(self, config: StrategyConfig) -> bool:
        return not option(config, "hybrid") and not option(config, "cpu_offload")

    def advises(self, config: StrategyConfig) -> bool:
        return False  # a sharded network has other compute times than the whole network, which is timed

    def step(
        self, config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link
    ) -> Step:
        weights = network.weights / (1 if precision == "float32" else 2)
        gradients, passes = network.gradients / narrowing(config), network.passes
        messages = passes * (network.blocks + 1)
        return predict_sharded(compute, passes * weights, passes * gradients, workers, link, messages=messages)
