"""Data parallelism with gradients that are compressed by PowerSGD and reduced after the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from launcher.engine.strategies.compression import PowerSGD
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.strategies.kinds.base import option


class PowerSGDParallel(DataParallel):
    """Reduces all gradients with two small messages per step; see `compression.PowerSGD`.

    A checkpoint contains the approximation errors of each worker.
    """

    wraps = False
    _power: PowerSGD

    def attach(self, optimizer: Optimizer, total_steps: int) -> None:
        super().attach(optimizer, total_steps)
        trained = [p for p in self._parameters if p.requires_grad]
        rank, after = option(self._config, "powersgd_rank"), option(self._config, "powersgd_after")
        self._power = PowerSGD(trained, self.runtime, rank, after, self._seed)

    def _combine(self, optimizer: Optimizer) -> None:
        # A step with an overflow is skipped; its gradients must not enter the errors.
        if not self._agree_on_overflow(optimizer):
            self._power.reduce()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "powersgd": self._power.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._power.load_state_dict(state["powersgd"])

    def own_state_dict(self) -> dict[str, Any]:
        return {"errors": dict(self._power.errors)}

    def load_own_state_dicts(self, states: Sequence[Mapping[str, Any]], resized: bool) -> None:
        self._power.load_errors([state["errors"] for state in states])
