"""Predicts the duration of a training step for each strategy, from measurements at the start of a run.

The prediction includes the share of the step that waits for the network. During the run the tag
`throughput/predicted_ratio` compares the prediction with the measured step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
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

_MIN_NETWORK_SHARE = 0.05  # of a step: below this share of network time no advice is printed
_TIMED_PASSES = 2  # after one warm-up pass


@dataclass(frozen=True)
class Advice:
    """The predicted steps of this job by strategy.

    Attributes:
        link: the measured link between the workers.
        steps: {label of a strategy: its predicted step}.
        chosen: the strategy of this run, a key of `steps`.
    """

    link: Link
    steps: dict[str, Step]
    chosen: str

    @property
    def step(self) -> Step:
        return self.steps[self.chosen]

    def line(self) -> str | None:
        """Return the advice to print, or None if a step spends less than 5% of its time waiting for the network."""
        if self.step.share < _MIN_NETWORK_SHARE:
            return None
        best = min(self.steps, key=lambda name: self.steps[name].seconds)
        mbit = self.link.bandwidth * 8 / 1e6
        prediction = (
            f"Between the workers: {self.link.latency * 1e3:.2f} ms, {mbit:,.0f} Mbit/s. Predicted with "
            f"strategy={self.chosen}: {number(self.step.seconds)} s a step, {self.step.share:.0%} of it waiting for "
            "the network."
        )
        if best == self.chosen or self.steps[best].seconds > 0.95 * self.step.seconds:
            return prediction
        others = ", ".join(
            f"{name} {number(step.seconds)} s" for name, step in self.steps.items() if name != self.chosen
        )
        return (
            f"{prediction} The fastest strategy is {best} ({others}); docs/exactness.md describes how each affects "
            "results."
        )


@dataclass(frozen=True)
class Measured:
    """Measurements of the model on this cluster, before it is wrapped.

    Attributes:
        link: the link between the workers.
        seconds: computing time of the slowest worker in one step.
        activations: bytes that autograd saves for one microbatch, the maximum over all workers.
    """

    link: Link
    seconds: float
    activations: int


def measure(model: nn.Module, compute: Callable[[], Any], passes: int, runtime: Runtime) -> Measured | None:
    """Measure the link and one forward and backward pass. A collective; see `advise` for the arguments.

    Returns None on every rank if any rank runs out of memory during the pass.
    """
    link = probe.measure(runtime.group, runtime.device)
    runtime.barrier()
    try:
        own: tuple[float, int] | None = _pass(model, compute, runtime.device)
    except torch.OutOfMemoryError:
        own = None
    found = runtime.gather(own)
    if None in found:
        return None
    return Measured(link, max(seconds for seconds, _ in found) * passes, max(saved for _, saved in found))


def advise(
    job: Job,
    model: nn.Module,
    compute: Callable[[], Any],
    passes: int,
    runtime: Runtime,
    measured: Measured | None = None,
) -> Advice | None:
    """Predict the step of each strategy for the advice that is printed at the start. A collective.

    Call it before the model is wrapped. Weights, buffers, gradients and random states are restored afterwards.

    Args:
        compute: calls `training_step` for a microbatch and returns its result.
        passes: microbatches in a worker's step.
        measured: the result of `measure`, if it has been called already.

    Returns:
        None if no prediction is possible: one worker, `trainer.compile`, `trainer.deterministic`, a strategy without
        a cost model, or not enough memory for a pass.
    """
    strategy, trainer = job.strategy, job.trainer
    # A compiled network, and the exact sums of deterministic mode, take another time than the pass that is measured.
    if runtime.world_size == 1 or trainer.compile or trainer.deterministic:
        return None
    if not kind_of(strategy, job.trust).advises(strategy):
        return None
    measured = measured or measure(model, compute, passes, runtime)
    if measured is None:
        return None
    link, seconds = measured.link, measured.seconds
    nbytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
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


def _pass(model: nn.Module, compute: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Return the seconds of the fastest of several forward and backward passes, and the bytes that autograd saves."""
    saved = SavedTensorBytes(model)
    times = []
    with preserve_model(model, device):
        for timed in range(1 + _TIMED_PASSES):
            began = time.perf_counter()
            with nullcontext() if timed else saved.recording():
                answer = compute()
            loss_of(answer)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times[1:]), saved.total
