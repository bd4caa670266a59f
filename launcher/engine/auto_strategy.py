"""Selects the strategy of a run with `strategy=auto`, once, when the run starts.

Only exact strategies are considered, which give the same losses as one worker (docs/exactness.md). Of those that fit
into a worker's memory, the one with the shortest predicted step is selected; if none fits, the one that needs the least
memory. The selection is stored in result.json, so a resumed run uses the same strategy even if the link has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from launcher.config import Job, StrategyConfig
from launcher.engine import hardware
from launcher.engine.advice import Measured, measure
from launcher.engine.control import Control
from launcher.engine.optimizer_check import optimizer_bytes
from launcher.engine.randomness import preserve_random_states
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.blocks import blocks_of, recompute
from launcher.engine.strategies.kinds.base import DEFAULT, Network, StrategyKind, kind_of, kinds
from launcher.errors import ConfigError
from launcher.formatting import number, size
from launcher.runs import RunDirectory

RESULT_KEY = "strategy"  # in result.json
ROOM = 0.9  # usable share of the memory; the framework and fragmentation use the rest


@dataclass(frozen=True)
class Candidate:
    """An exact strategy that a run may use.

    Attributes:
        needs: bytes of memory per worker.
        seconds: the predicted duration of a step, or None if no pass was timed.
    """

    name: str
    needs: float
    seconds: float | None = None


def choose(candidates: list[Candidate], room: float) -> Candidate:
    """Return the fastest of the candidates that fit into `room` bytes, the first of several equally fast ones.

    If none fits, return the one that needs the least memory.
    """
    fitting = [candidate for candidate in candidates if candidate.needs <= room]
    if not fitting:
        return min(candidates, key=lambda candidate: candidate.needs)
    return min(fitting, key=lambda candidate: candidate.seconds or 0.0)


def resolve_strategy(
    job: Job,
    model: nn.Module,
    compute: Callable[[], Any],
    passes: int,
    runtime: Runtime,
    directory: RunDirectory,
    control: Control,
) -> tuple[Job, Measured | None]:
    """Replace `strategy=auto` of a job with the selected strategy; return other jobs unchanged. A collective.

    Call it before the model is wrapped; rank 0 decides. See `advice.advise` for the arguments.

    Returns:
        The job, and the measurements if any were made.
    """
    if not kind_of(job.strategy, job.trust).chooses:
        return job, None
    measured = None
    if job.trainer.deterministic:
        name, why = DEFAULT, "trainer.deterministic=true needs it"
    elif recorded := runtime.broadcast(directory.result().get(RESULT_KEY) if runtime.is_first else None):
        name, why = recorded, "the run started with it"
    elif runtime.world_size == 1:  # torchrun creates a process group for one process, too
        name, why = DEFAULT, "there is one worker"
    else:
        if job.strategy.activation_checkpointing:
            recompute(model, job.strategy.blocks)
        name, why, measured = _decide(job, model, compute, passes, runtime)
    if runtime.is_first:
        directory.update_result(**{RESULT_KEY: name})
        control.emit({"kind": "note", "text": f"strategy=auto selects {name}: {why}."})
    return replace(job, strategy=replace(job.strategy, name=name)), measured


def _decide(
    job: Job,
    model: nn.Module,
    compute: Callable[[], Any],
    passes: int,
    runtime: Runtime,
) -> tuple[str, str, Measured | None]:
    """Return the name of the strategy and the reason, the same on every rank, and the measurements of this rank."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    with preserve_random_states():
        optimizer = optimizer_bytes(job, model)
    whole = {"parameters": weights, "gradients": trained, "optimizer": optimizer}
    rooms = runtime.gather(hardware.memory_of_a_worker(runtime, job.scaling.gpus_per_worker))
    room = ROOM * min(rooms)
    # A pass needs at least the memory of the weights and their gradients.
    measured = measure(model, compute, passes, runtime) if weights + trained <= room else None
    n, precision = runtime.world_size, job.trainer.precision
    network = Network(weights, trained, blocks=len(blocks_of(model, job.strategy.blocks)), passes=passes)
    candidates = []
    for kind in _possible(job, model):
        config = StrategyConfig(kind.name)
        needs = float(sum(kind.memory(config, n, whole).values()))
        if measured is None:
            # The whole network does not fit into the memory of one worker: its size or the failed pass shows it.
            candidates.append(Candidate(kind.name, needs if kind.divides else max(needs, room + 1)))
            continue
        step = kind.step(config, precision, network, measured.seconds, n, measured.link)
        candidates.append(Candidate(kind.name, needs + measured.activations, step.seconds))
    chosen = choose(candidates, room)
    return (*runtime.broadcast((chosen.name, _reason(chosen, candidates, min(rooms)))), measured)


def _possible(job: Job, model: nn.Module) -> list[StrategyKind]:
    """Return the exact strategies that support this network."""
    possible = []
    for kind in kinds():
        if kind.exact and not kind.chooses:
            with suppress(ConfigError):
                kind.check_model(model, job.strategy)
                possible.append(kind)
    return possible


def _reason(chosen: Candidate, candidates: list[Candidate], memory: float) -> str:
    needs = ", ".join(f"{size(other.needs)} of memory with {other.name}" for other in candidates)
    text = f"a worker needs {needs}, and has {size(memory)}"
    if chosen.seconds is None:
        return f"{text}; no step was timed because {DEFAULT} does not fit into the memory"
    steps = ", ".join(f"{number(other.seconds)} s with {other.name}" for other in candidates if other.seconds)
    return f"{text}; the predicted steps take {steps}"
