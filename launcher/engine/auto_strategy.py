"""`strategy=auto`: what a run takes of the strategies that give the same losses, decided once, at its start.

The exact ones keep the losses of one worker (docs/exactness.md). Among those that a worker's memory holds, the one with
the shortest predicted step is taken; where none is held, the one that needs the least. The decision is kept in
result.json: a run that is continued keeps it, whatever the link is like that day.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from launcher.config import Job, StrategyConfig
from launcher.engine import hardware
from launcher.engine.advice import Measured, measure
from launcher.engine.control import Control
from launcher.engine.randomness import preserve_random_states
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.blocks import blocks_of, recompute
from launcher.engine.strategies.kinds.base import DEFAULT, Network, StrategyKind, kind_of, kinds
from launcher.errors import ConfigError
from launcher.formatting import number, size
from launcher.runs import RunDirectory

KEPT = "strategy"  # the key of result.json
ROOM = 0.9  # of the memory: the rest is the framework's, and what lies between the pieces


@dataclass(frozen=True)
class Candidate:
    """An exact strategy. needs: bytes of a worker. seconds: of a step, as predicted; None where nothing was timed."""

    name: str
    needs: float
    seconds: float | None = None


def choose(candidates: list[Candidate], room: float) -> Candidate:
    """Return the quickest of the candidates that `room` bytes hold, the first where none is quicker than another.

    Where none is held: the one that needs the least.
    """
    held = [candidate for candidate in candidates if candidate.needs <= room]
    if not held:
        return min(candidates, key=lambda candidate: candidate.needs)
    return min(held, key=lambda candidate: candidate.seconds or 0.0)


def resolve_strategy(
    job: Job,
    model: nn.Module,
    batch: Any,
    passes: int,
    runtime: Runtime,
    directory: RunDirectory,
    control: Control,
    cast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Job, Measured | None]:
    """Return the job with the strategy that `auto` stands for, and what was measured; other jobs as they are.

    Every rank calls it, before the model is wrapped; rank 0 decides. See `advice.advise` for the arguments.
    """
    if not kind_of(job.strategy, job.trust).chooses:
        return job, None
    measured = None
    if job.trainer.deterministic:
        name, why = DEFAULT, "trainer.deterministic=true needs it"
    elif kept := runtime.broadcast(directory.result().get(KEPT) if runtime.is_first else None):
        name, why = kept, "as this run began"
    elif runtime.world_size == 1:  # also in a process group of one, which torchrun makes
        name, why = DEFAULT, "there is one worker"
    else:
        if job.strategy.activation_checkpointing:
            recompute(model, job.strategy.blocks)
        name, why, measured = _decide(job, model, batch, passes, runtime, cast)
    if runtime.is_first:
        directory.update_result(**{KEPT: name})
        control.emit({"kind": "note", "text": f"strategy=auto takes {name}: {why}."})
    return replace(job, strategy=replace(job.strategy, name=name)), measured


def _decide(
    job: Job,
    model: nn.Module,
    batch: Any,
    passes: int,
    runtime: Runtime,
    cast: Callable[[], AbstractContextManager[Any]],
) -> tuple[str, str, Measured | None]:
    """Return the name, the reason in words, and what was measured, the first two the same on every rank."""
    from launcher.engine.optimizer_check import optimizer_bytes

    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with preserve_random_states():
        optimizer = optimizer_bytes(job, model)
    whole = {"parameters": weights, "gradients": trained, "optimizer": optimizer}
    rooms = runtime.gather(hardware.memory_of_a_worker(runtime, job.scaling.gpus_per_worker))
    room = ROOM * min(rooms)
    # A pass needs the weights, their gradients and the activations: it is not even tried where it cannot succeed.
    measured = measure(model, batch, passes, runtime, cast) if weights + trained <= room else None
    n, precision = runtime.world_size, job.trainer.precision
    network = Network(weights, trained, blocks=len(blocks_of(model, job.strategy.blocks)), passes=passes)
    candidates = []
    for kind in _possible(job, model):
        config = StrategyConfig(kind.name)
        needs = float(sum(kind.memory(config, n, whole).values()))
        if measured is None:
            # A whole network has been ruled out: by its weights and gradients, or by the pass.
            candidates.append(Candidate(kind.name, needs if kind.divides else max(needs, room + 1)))
            continue
        step = kind.step(config, precision, network, measured.seconds, n, measured.link)
        candidates.append(Candidate(kind.name, needs + measured.activations, step.seconds))
    chosen = choose(candidates, room)
    return (*runtime.broadcast((chosen.name, _reason(chosen, candidates, min(rooms)))), measured)


def _possible(job: Job, model: nn.Module) -> list[StrategyKind]:
    """Return the exact strategies that take this network."""
    possible = []
    for kind in kinds():
        if kind.exact and not kind.chooses:
            with suppress(ConfigError):
                kind.check_model(model, job.strategy)
                possible.append(kind)
    return possible


def _reason(chosen: Candidate, candidates: list[Candidate], memory: float) -> str:
    held = ", ".join(f"{size(other.needs)} of memory with {other.name}" for other in candidates)
    text = f"a worker needs {held}, and has {size(memory)}"
    if chosen.seconds is None:
        return f"{text}; nothing was timed, since {DEFAULT} does not fit"
    steps = ", ".join(f"{number(other.seconds)} s with {other.name}" for other in candidates if other.seconds)
    return f"{text}; predicted are {steps} a step"
