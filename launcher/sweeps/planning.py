"""What a sweep will do, decided before anything starts: how much of it fits at a time, what its first trial does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.config import Composition, SweepConfig, parse_interval
from launcher.errors import ConfigError, did_you_mean
from launcher.jobs.record import check_budget
from launcher.jobs.training import Observer, checked_plan
from launcher.jobs.weights import weights_of
from launcher.planning.plan import Placement, Plan, machines_of
from launcher.runners.tasks import Shape, fits
from launcher.sweeps.observer import Headline
from launcher.sweeps.search import SIZES, grid
from launcher.sweeps.specification import SweepSpec
from launcher.sweeps.study import Objective
from launcher.sweeps.syntax import SearchSpace

_MOST_SIZES = 64


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is ready to start here, or one with nothing left to do.

    `plan` is that of the first trial, `concurrency` counts the trials at a time on what is here now.
    """

    spec: SweepSpec
    plan: Plan
    concurrency: int
    evaluations: int | None

    def headline(self) -> Headline:
        """Return what is told of a sweep that begins."""
        spec, m = self.spec, self.plan.machines
        each = f"{m.workers} {'GPU' if m.device == 'cuda' else 'CPU'} worker{'s' if m.workers > 1 else ''}"
        text = spec.told(f"{self.concurrency} at a time on {each} each ({m.description})")
        return Headline(text, [axis.key for axis in spec.space.axes], spec.total)


def plan_sweep(spec: SweepSpec, observer: Observer) -> SweepPlan:
    """Work out what a sweep does on the machines that its configuration names.

    Raises:
        ConfigError, TrustError: a trial cannot be composed, or logs no such tag.
        RunError: its budget is spent.
        ResourceError: a trial is larger than what is there.
    """
    for composition in check_values(spec):
        machines_of(composition.job)
    plan = checked_plan(spec.first.job, observer, weights=weights_of(spec.first.job, spec.root))
    for note in plan.notes:
        observer.event({"kind": "note", "text": note})
    for objective in spec.objectives:
        if objective.tag not in plan.tags:
            raise ConfigError(
                f"sweep.metric={objective.tag}: the job logs no such tag.{did_you_mean(objective.tag, plan.tags)} "
                f"It logs {', '.join(plan.tags)}."
            )
    if spec.resumes:
        check_budget(spec.directory, spec.directory.result(), plan.rate)
    return SweepPlan(
        spec=spec,
        plan=plan,
        concurrency=_concurrency(plan.machines, spec.settings, spec.total),
        evaluations=_evaluations(spec, plan, spec.objectives[0]),
    )


def check_values(spec: SweepSpec) -> list[Composition]:
    """Compose trials that have every value between them, and return them. Raises ConfigError."""
    return [spec.compose_words(words) for words in _samples(spec.space)]


def shape_of(machines: Placement) -> Shape:
    return Shape(machines.workers, machines.cpus_per_worker, machines.gpus_per_worker)


def _samples(space: SearchSpace) -> Iterator[list[str]]:
    """Yield words of trials that are composed to find mistakes: each text once, of many numbers the ends, all sizes."""
    first = next(iter(grid(space.with_first_only())))
    for axis in space.axes:
        if not axis.key.startswith(SIZES):
            for value in axis.samples()[1:]:
                yield space.trial({**first, axis.key: value})
    sizes = [axis for axis in space.axes if axis.key.startswith(SIZES)]
    for values in itertools.islice(itertools.product(*(axis.samples(all_of=True) for axis in sizes)), 1, _MOST_SIZES):
        yield space.trial({**first, **dict(zip((axis.key for axis in sizes), values, strict=True))})


def _concurrency(machines: Placement, settings: SweepConfig, total: int) -> int:
    if machines.in_process:
        return 1
    most, shape, count = min(settings.concurrency or total, total), shape_of(machines), 1
    while count < most and fits([shape] * (count + 1), machines.cpus, machines.gpus):
        count += 1
    return count


def _evaluations(spec: SweepSpec, plan: Plan, objective: Objective) -> int | None:
    trainer = spec.first.job.trainer
    key = "evaluate_every" if objective.tag.startswith("val/") else "log_every"
    interval = parse_interval(getattr(trainer, key), f"trainer.{key}")
    if interval.steps is not None:
        return -(-plan.batches.steps // interval.steps)
    if interval.epochs is not None:
        return max(1, -(-int(plan.batches.epochs) // interval.epochs))
    return None
