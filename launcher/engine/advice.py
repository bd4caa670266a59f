"""Measured advice at the start of a run: what a step will take, how much of that waits for the network, and what of the
other strategies would take less. After the run `throughput/predicted_ratio` says how good the prediction was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.config import Job, StrategyConfig
from launcher.engine import probe
from launcher.engine.cost import Link, Step
from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Runtime
from launcher.engine.saved_tensors import SavedTensorBytes
from launcher.engine.strategies.kinds.base import DEFAULT, Network, kind_of, kinds, label
from launcher.engine.strategies.strategy import loss_of
from launcher.formatting import number

_WORTH_TELLING = 0.05  # of the step waits for the network
_TIMED = 2  # passes, after one that warms up


@dataclass(frozen=True)
class Advice:
    """Predictions by strategy, for the network and batch of this job on this link.

    Attributes:
        chosen: the strategy of this run, one of `steps`.
    """

    link: Link
    steps: dict[str, Step]
    chosen: str

    @property
    def step(self) -> Step:
        return self.steps[self.chosen]

    def line(self) -> str | None:
        """Return what to tell the user, or None where the network hardly matters."""
        if self.step.share < _WORTH_TELLING:
            return None
        best = min(self.steps, key=lambda name: self.steps[name].seconds)
        mbit = self.link.bandwidth * 8 / 1e6
        told = (
            f"Between the workers: {self.link.latency * 1e3:.2f} ms, {mbit:,.0f} Mbit/s. Predicted with "
            f"strategy={self.chosen}: {number(self.step.seconds)} s a step, {self.step.share:.0%} of it waiting for "
            "the network."
        )
        if best == self.chosen or self.steps[best].seconds > 0.95 * self.step.seconds:
            return told
        others = ", ".join(
            f"{name} {number(step.seconds)} s" for name, step in self.steps.items() if name != self.chosen
        )
        return f"{told} The quickest a step: {best} ({others}); docs/exactness.md says what each changes."


@dataclass(frozen=True)
class Measured:
    """The link, the seconds that a worker computes in a step, and the bytes that a microbatch keeps for its gradients.

    The seconds are those of the slowest worker, the bytes those of the one that keeps most.
    """

    link: Link
    seconds: float
    activations: int


def measure(
    model: nn.Module, batch: Any, passes: int, runtime: Runtime, cast: Callable[[], AbstractContextManager[Any]]
) -> Measured | None:
    """Measure; every rank calls it, see `advise`. None, on every rank, where one has no memory for a pass."""
    link = probe.measure(runtime.group, runtime.device)
    runtime.barrier()
    try:
        own: tuple[float, int] | None = _pass(model, batch, runtime.device, cast)
    except torch.OutOfMemoryError:
        own = None
    found = runtime.gather(own)
    if None in found:
        return None
    return Measured(link, max(seconds for seconds, _ in found) * passes, max(kept for _, kept in found))


def advise(
    job: Job,
    model: nn.Module,
    batch: Any,
    passes: int,
    runtime: Runtime,
    cast: Callable[[], AbstractContextManager[Any]],
    measured: Measured | None = None,
) -> Advice | None:
    """Measure and predict; every rank calls it, before the model is wrapped. None where a prediction means nothing.

    Args:
        batch: a microbatch on the device. Weights, buffers, gradients and random states are as before afterwards.
        passes: microbatches in a worker's step.
        cast: the context in which the network computes.
        measured: by `measure`, where that was done already.
    """
    strategy, trainer = job.strategy, job.trainer
    # One worker waits for no other; a compiled network computes otherwise than this one; exact sums do so too.
    if runtime.world_size == 1 or trainer.compile or trainer.deterministic:
        return None
    if not kind_of(strategy, job.trust).advises(strategy):
        return None
    measured = measured or measure(model, batch, passes, runtime, cast)
    if measured is None:
        return None
    link, seconds = measured.link, measured.seconds
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    n = runtime.world_size
    network = Network(nbytes, nbytes, passes=passes)
    configs = [StrategyConfig(), StrategyConfig(compression="bf16")]
    others = [(kind, StrategyConfig(kind.name)) for kind in kinds() if not kind.chooses and kind.name != DEFAULT]
    configs += [config for kind, config in others if kind.advises(config)]
    known = {label(config): config for config in [*configs, strategy]}
    steps = {
        name: kind_of(config).step(config, trainer.precision, network, seconds, n, link)
        for name, config in known.items()
    }
    return Advice(link, steps, label(strategy))


def _pass(
    model: nn.Module, batch: Any, device: torch.device, cast: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, int]:
    """Return the seconds of one forward and backward pass, the quickest of some, and the bytes kept between the two."""
    kept = SavedTensorBytes(model)
    times = []
    with preserve_model(model, device):
        for again in range(1 + _TIMED):
            began = time.perf_counter()
            with cast(), nullcontext() if again else kept.recording():
                answer = model.training_step(batch)  # type: ignore[operator]
            loss_of(answer)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times[1:]), kept.total
