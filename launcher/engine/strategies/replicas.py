"""Local SGD and DiLoCo: workers train independently and synchronize every few steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.config import StrategyConfig, TrainerConfig
from launcher.engine.checkpoint.training import load_optimizer_state, optimizer_state
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.compression import WIRE
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.strategies.kinds.base import option
from launcher.engine.strategies.outer import OuterOptimizer
from launcher.engine.strategies.strategy import Record, all_finite


class Replicas(DataParallel):
    """Each worker applies the gradient of its part of the global batch; an `OuterOptimizer` synchronizes the weights.

    A worker's gradient is the sum over its samples times workers / samples of the global batch, so the mean over the
    workers is the gradient of the global batch: with plain SGD and a synchronization after each step, the result is
    that of `ddp`. Each worker clips its own gradient. A worker without samples in a batch takes no step, and no worker
    does if one of them has a float16 overflow. The inner optimizer is then called without gradients, so that its hooks
    still count the step.

    The shared weights are evaluated, saved and exported, not those of one worker. A checkpoint also contains the
    weights and the inner optimizer of every worker. If the number of workers has changed, the replicas are synchronized
    on resume, and all workers use the inner optimizer of rank 0.
    """

    wraps = False
    shares_gradients = False
    _outer: OuterOptimizer
    _optimizer: Optimizer
    _shared_buffers: dict[str, Tensor] | None = None  # buffers of the last synchronization, for the shared weights

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        trainer: TrainerConfig,
        config: StrategyConfig,
        outer_lr: float,
        outer_momentum: float,
    ) -> None:
        super().__init__(model, runtime, trainer, config)
        self._outer_lr, self._outer_momentum = outer_lr, outer_momentum

    def attach(self, optimizer: Optimizer, total_steps: int) -> None:
        super().attach(optimizer, total_steps)
        config = self._config
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._optimizer = optimizer
        self._outer = OuterOptimizer(
            optimizer,
            self._trained,
            self.runtime,
            every=option(config, "inner_steps"),
            lr=self._outer_lr,
            momentum=self._outer_momentum,
            delay=option(config, "overlap_steps"),
            wire=WIRE.get(config.compression),
            total_steps=total_steps,
            synchronized=self._synchronize_buffers,
        )

    def _synchronize_buffers(self) -> None:
        """Merge the buffers of all workers after their weights were synchronized."""
        self.buffers.merge()
        self._shared_buffers = self.buffers.copy()

    def merge_buffers(self) -> None:
        """Do nothing: buffers are merged at each synchronization, and `evaluation_weights` uses the merged buffers."""

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        if self._shared_buffers is None:
            self._shared_buffers = self.buffers.copy()  # before the first step they are equal on all workers
        return super().accumulate(batches, size, flags, record)

    def _clip_and_step(self, optimizer: Optimizer, grads: list[torch.Tensor]) -> None:
        if not (self._idle or self._overflowed):
            super()._clip_and_step(optimizer, grads)
            return
        self._norm = torch.zeros((), device=self.runtime.device)
        self._clear()
        optimizer.step()
        self._scaler.update()

    def _combine(self, optimizer: Optimizer) -> None:
        self._overflowed = self._agree_on_overflow(optimizer)  # all workers use the same loss scale

    def grad_norm(self) -> torch.Tensor:
        """Return the root of the mean over the workers of the squared norms of their gradients."""
        norm = super().grad_norm().double().reshape(1)
        return (self.runtime.add_up(norm.square()) / self.runtime.world_size).sqrt().squeeze(0)

    def replicated(self) -> list[tuple[nn.Parameter, Tensor]]:
        return list(zip(self._trained, self._outer.weights, strict=True))

    def is_finite(self) -> bool:
        return self._on_every_rank(super().is_finite() and all_finite(self._outer.weights))

    @contextmanager
    def evaluation_weights(self) -> Iterator[dict[str, Tensor]]:
        with self._outer.shown(self._trained), self.buffers.shown(self._shared_buffers or {}) as own:
            yield own

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "outer": self._outer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._outer.load_state_dict(state["outer"])
        self._shared_buffers = self.buffers.copy()

    def own_state_dict(self) -> dict[str, Any]:
        inner = optimizer_state(self.model, self._optimizer)["state"]
        return {"outer": self._outer.own_state_dict(), "optimizer": inner}

    def load_own_state_dicts(self, states: Sequence[Mapping[str, Any]], resized: bool) -> None:
        self._outer.load_own_state_dicts([state["outer"] for state in states], resized)
        if not resized:
            self._load_inner(states[0]["optimizer"])

    def _load_inner(self, saved: Mapping[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())

        def with_layout(name: str, value: Any) -> Any:
            """Return `value` in the memory layout of its parameter, which fused kernels expect."""
            parameter = parameters.get(name)
            if not isinstance(value, torch.Tensor) or parameter is None or value.shape != parameter.shape:
                return value
            return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)

        state = {
            name: {key: with_layout(name, value) for key, value in values.items()} for name, values in saved.items()
        }
        current = optimizer_state(self.model, self._optimizer)
        load_optimizer_state(self.model, self._optimizer, {**current, "state": state})
