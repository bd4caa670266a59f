"""A strategy of another package, in one file that registers itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Vote
from launcher.engine.strategies.kinds.base import StrategyKind, register
from launcher.engine.strategies.strategy import Record, Strategy, loss_of
from launcher.errors import ConfigError
from tests.support import engine_toys


class Summed(Strategy):
    """Sums the gradients of all ranks after the backward pass, without overlap."""

    def prepare(self, batch: Any) -> dict[str, Any]:
        self._broadcast()
        with preserve_model(self.model, self.runtime.device):
            return self._warm_up(self._steps, batch)

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        self._clear()
        total = 0.0
        for batch in batches:
            answer = self._steps(batch)
            loss, count = loss_of(answer)
            total += float(count)
            loss.backward()
            record(answer)
        return self.runtime.vote(total, flags).wait()

    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        for parameter in self.optimized:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.runtime.add_up(parameter.grad).div_(vote.count)
        self._clip_and_step(optimizer, [p.grad for p in self.optimized if p.grad is not None])


@register
class Toy(StrategyKind):
    name = "toy"

    def check(self, config: Any, trainer: Any) -> None:
        if config.compression != "none":
            raise ConfigError("strategy=toy compresses nothing. Leave strategy.compression out.")

    def build(self, model: nn.Module, runtime: Any, trainer: Any, config: Any, split: Any) -> Strategy:
        return Summed(model, runtime, trainer)


class Net(engine_toys.Net):
    """A network in this file, so that every rank can import it."""
