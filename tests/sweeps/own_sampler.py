"""A sampler and a pruner of a user, in the calling directory."""

from __future__ import annotations

from typing import Any

import optuna


class Fixed(optuna.samplers.BaseSampler):
    """Samples the same fraction of each interval."""

    def __init__(self, fraction: float, seed: int | None = None) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction {fraction}")
        self._fraction, self.seed = fraction, seed

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
        low, high = param_distribution.low, param_distribution.high
        return float(low + self._fraction * (high - low))


class EveryTrial(optuna.pruners.BasePruner):
    """Prunes each trial after its first evaluation."""

    def prune(self, study: Any, trial: Any) -> bool:
        return True
