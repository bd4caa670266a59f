"""Plan a sweep before anything starts: check its trials, and determine how many run at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.config import Composition, SweepConfig, parse_interval
from launcher.config.overrides import masked
from launcher.errors import ConfigError, did_you_mean
from launcher.jobs.record import check_budget
from launcher.jobs.training import Observer, checked_plan
from launcher.jobs.weights import weights_of
from launcher.money import Rate
from launcher.planning.plan import Placement, Plan, machines_of
from launcher.runners.tasks import Shape, fits
from launcher.sweeps.conditions import check_signatures
from launcher.sweeps.observer import Headline
from launcher.sweeps.search import SIZES
from launcher.sweeps.space import SearchSpace, Value
from launcher.sweeps.specification import SweepSpec
from launcher.sweeps.study import Objective

_MOST_SIZES = 64


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can start on this machine, or that has no trials left.

    Attributes:
        plan: the plan of the first trial.
        concurrency: number of trials that run at a time with the current resources.
        evaluations: number of evaluations of a complete trial, None if unknown.
    """

    spec: SweepSpec
    plan: Plan
    concurrency: int
    evaluations: int | None

    def headline(self) -> Headline:
        """Return the summary that is printed at the start."""
        spec, m = self.spec, self.plan.machines
        each = f"{m.workers} {'GPU' if m.device == 'cuda' else 'CPU'} worker{'s' if m.workers > 1 else ''}"
        text = spec.summary(f"{self.concurrency} at a time on {each} each ({m.description})")
        return Headline(text, spec.space.keys, spec.total)

    def rate_of(self, shape: Shape) -> Rate | None:
        """Return the rate of a trial: its share of the machines, without the budget, which applies to the sweep."""
        rate, machines = self.plan.rate, self.plan.machines
        if rate is None:
            return None
        total, used = (
            (machines.gpus, shape.gpus_per_worker) if shape.gpus_per_worker else (machines.cpus, shape.cpus_per_worker)
        )
        return replace(rate, budget=None, share=min(1.0, shape.workers * used / total) if total else 1.0)


def plan_sweep(spec: SweepSpec, observer: Observer) -> SweepPlan:
    """Plan a sweep on the machines of its configuration.

    Raises:
        ConfigError, TrustError: a trial is invalid, or does not log the objective.
        RunError: the budget is spent.
        ResourceError: a trial needs more resources than there are.
    """
    for composition in check_trials(spec):
        check_signatures(composition.job)
        machines_of(composition.job)
    plan = checked_plan(spec.first.job, observer, weights=weights_of(spec.first.job, spec.root))
    for note in plan.notes:
        observer.event({"kind": "note", "text": note})
    for objective in spec.objectives:
        if objective.tag not in plan.tags:
            raise ConfigError(
                f"sweep.metric is {objective.tag}, but the job logs no such tag."
                f"{did_you_mean(objective.tag, plan.tags)} It logs {', '.join(plan.tags)}.",
                key="sweep.metric",
            )
    if spec.resumes:
        check_budget(spec.directory, spec.directory.result(), plan.rate)
    return SweepPlan(
        spec=spec,
        plan=plan,
        concurrency=_concurrency(plan.machines, spec.settings, spec.total),
        evaluations=_evaluations(spec, plan, spec.objectives[0]),
    )


def check_trials(spec: SweepSpec) -> list[Composition]:
    """Compose trials that cover every value, and return the compositions.

    Raises:
        ConfigError: a trial cannot be composed, or has other settings of the sweep than the first trial.
    """
    found = []
    for values in _samples(spec.space):
        composition = spec.compose_words(spec.space.trial(values))
        _check_settings(spec, composition, values)
        found.append(composition)
    return found


def _check_settings(spec: SweepSpec, composition: Composition, values: dict[str, Value]) -> None:
    """Raise ConfigError if swept options (such as experiments) set different values of a setting of the sweep."""
    first, other = _settings(spec.first, spec), _settings(composition, spec)
    for key, value in first.items():
        if other[key] != value:
            words = " ".join(masked(word) for word in spec.space.overrides(values))
            initial = " ".join(
                masked(word) for word in spec.space.overrides(spec.space.active(spec.space.first_values()))
            )
            raise ConfigError(
                f"{key} applies to the sweep as a whole, but the trials have different values: {value!r} with "
                f"{initial}, and {other[key]!r} with {words}. Set it on the command line, or start one sweep for each.",
                key=key,
            )


def _settings(composition: Composition, spec: SweepSpec) -> dict[str, Any]:
    """Return the settings of a composition that must be equal in all trials, by dotted key."""
    job = composition.job
    found = {f"sweep.{key}": value for key, value in asdict(job.sweep).items()}
    found |= {f"cluster.{key}": value for key, value in asdict(job.cluster).items()}
    found |= {"run.root": job.run.root, "run.name": job.run.name}
    if job.sweep.metric is None and "checkpoint.monitor" not in spec.space.keys:
        found |= {"checkpoint.monitor": job.checkpoint.monitor, "checkpoint.mode": job.checkpoint.mode}
    found["hydra.sweeper.params"] = composition.sweeper.get("params") or {}
    return found


def shape_of(machines: Placement) -> Shape:
    """Return the number of workers of a trial, and the CPUs and GPUs of each."""
    return Shape(machines.workers, machines.cpus_per_worker, machines.gpus_per_worker)


def _samples(space: SearchSpace) -> Iterator[dict[str, Value]]:
    """Yield values of trials to compose: each text once, of many numbers the extremes, and all combinations of sizes.

    Each option of a swept group is combined with the first value of every key that it has.
    """
    first = space.first_values()
    for axis in space.axes:
        if axis.key.startswith(SIZES):
            continue
        condition = space.conditions.get(axis.key)
        base = first if condition is None else {**first, condition.parent: condition.values[0]}
        for value in axis.samples()[condition is None :]:
            yield space.active({**base, axis.key: value})
    sizes = [axis for axis in space.axes if axis.key.startswith(SIZES)]
    for values in itertools.islice(itertools.product(*(axis.samples(True) for axis in sizes)), 1, _MOST_SIZES):
        yield space.active({**first, **dict(zip((axis.key for axis in sizes), values, strict=True))})


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
