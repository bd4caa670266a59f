"""Collects and restores the state of a run: the part that all ranks share, and the part of each rank."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from launcher.engine import checkpoint
from launcher.engine.callbacks import Callbacks
from launcher.engine.metrics import Sums
from launcher.engine.order import mix
from launcher.engine.progress import Progress
from launcher.engine.randomness import seed_everything
from launcher.engine.runtime import Runtime
from launcher.engine.schedules import Schedule
from launcher.engine.strategies.strategy import Strategy
from launcher.engine.trained_parameters import TrainedParameters


class State:
    """Collects and restores the state of a training run.

    Shared state: model, optimizer, schedule, strategy (loss scaler), callbacks, position and counters, and the averaged
    weights of a callback. State of each rank: random states, the sums of the current log interval, the rank's state of
    the strategy, and the buffers that differ from the merged ones. If the number of workers has changed, rank 0 loads
    all sums (which keeps the totals), all ranks use the merged buffers, and the random states are seeded again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        strategy: Strategy,
        callbacks: Callbacks,
        trained: TrainedParameters,
        sums: Sums,
        progress: Progress,
        runtime: Runtime,
        seed: int,
    ) -> None:
        self._model, self._optimizer, self._schedule, self._strategy = model, optimizer, schedule, strategy
        self._callbacks, self._trained, self._sums, self._progress = callbacks, trained, sums, progress
        self._runtime, self._seed = runtime, seed

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (shared, own) for `Checkpointer.save`."""
        with self._strategy.evaluation_weights() as buffers:
            trained = checkpoint.training_state(self._model, self._optimizer)
            averaged = self._callbacks.weights()
        shared = {
            **trained,
            "scheduler": self._schedule.state_dict(),
            "strategy": self._strategy.state_dict(),
            "progress": self._progress.state_dict(),
            "callbacks": self._callbacks.state_dict(),
        }
        if (changed := self._trained.state_dict()) is not None:
            shared["trained"] = changed
        if averaged is not None:
            shared["weights"] = averaged
        own = {
            "random": random_states(self._runtime.device),
            "sums": self._sums.state_dict(),
            "strategy": self._strategy.own_state_dict(),
            "buffers": buffers,
        }
        return shared, own

    def load(self, path: Path) -> None:
        """Restore the checkpoint at `path`, which has been verified.

        Raises:
            CheckpointError: it does not fit the model or the optimizer; names the differences.
        """
        self._trained.load_state_dict(checkpoint.inspect(path).state.get("trained"))
        rank, world_size = self._runtime.rank, self._runtime.world_size
        content = checkpoint.restore_training(
            path, self._model, self._optimizer, verified=True, rank=(rank, world_size)
        )
        self._load_rest(content.state)
        resized = content.world_size != world_size
        self._strategy.load_own_state_dicts(
            [own["strategy"] for own in (content.own if resized else content.own[rank : rank + 1])], resized
        )
        if not resized:
            self._sums.load_state_dicts([content.own[rank]["sums"]])
            self._strategy.buffers.put(content.own[rank].get("buffers", {}))
            set_random_states(content.own[rank]["random"], self._runtime.device)
        else:
            self._sums.load_state_dicts([own["sums"] for own in content.own] if rank == 0 else [])
            self.seed_rank()

    def _load_rest(self, shared: dict[str, Any]) -> None:
        """Restore the shared state except for the model and the optimizer."""
        restored = Progress.of(shared["progress"])
        self._schedule.load_state_dict(shared["scheduler"], restored.step, restored.epoch)
        self._strategy.load_state_dict(shared["strategy"])
        self._callbacks.load_state_dict(shared.get("callbacks", {}))
        for item in fields(Progress):
            setattr(self._progress, item.name, getattr(restored, item.name))

    def seed_rank(self) -> None:
        """Seed the random states, differently on every rank, so that dropout masks differ."""
        seed_everything(mix(self._seed, self._progress.step, self._runtime.rank))


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the global random generators of this rank, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": np.random.get_state(legacy=False),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the result of `random_states`."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
