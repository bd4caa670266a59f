"""`strategy=local_sgd`: workers train independently, and their weights are averaged every few steps."""

from __future__ import annotations

from types import MappingProxyType

from launcher.config.schema import StrategyConfig
from launcher.engine.strategies.kinds.base import register
from launcher.engine.strategies.kinds.replicas import ReplicasKind


@register
class LocalSgd(ReplicasKind):
    """Local SGD (Stich 2019)."""

    name = "local_sgd"
    position = 2
    options = MappingProxyType({"inner_steps": 8, "overlap_steps": 0})
    checkpoint_options = tuple(options)

    def outer(self, config: StrategyConfig) -> tuple[float, float]:
        return 1.0, 0.0
