"""What a sweep will do, decided before anything starts: its space, its objectives, its size, and where it fits.

Only the directory of a sweep that is continued is touched (a journal that a killed driver has left half-written).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import ranks, runs, targets
from launcher.checks import check_run
from launcher.config import Composition, SweepConfig, compose, default_run_name, parse_interval, peek, sources
from launcher.errors import ConfigError, RunError, did_you_mean
from launcher.jobs import Observer, checked_plan
from launcher.plan import Machines, Plan, machines_of
from launcher.prepare import Request, key_of, root_of, run_like
from launcher.run_record import check_budget
from launcher.runners.tasks import Shape, fits
from launcher.runs import RunDirectory
from launcher.schema import ClusterConfig
from launcher.storage import is_uri
from launcher.sweeps import syntax
from launcher.sweeps.space import SIZES, distributions, grid, sampler
from launcher.sweeps.study import JOURNAL, Objective, Recorded, mend, recorded
from launcher.sweeps.syntax import Choice, Value, Words
from launcher.words import shown

_MOST_SIZES = 64


@dataclass(frozen=True)
class Planned:
    """A sweep that is ready to start, or one with nothing left to do.

    `plan` is that of the first trial. `total` counts all trials, `concurrency` those at a time on what is here now.
    `sweeper` is the judged `hydra.sweeper`, which Hydra makes its sweeper from.
    """

    request: Request
    directory: RunDirectory
    words: Words
    settings: SweepConfig
    objectives: tuple[Objective, ...]
    plan: Plan
    total: int
    concurrency: int
    evaluations: int | None
    stored: Path | None
    recorded: Recorded
    sweeper: dict[str, Any]
    cluster: ClusterConfig  # of the sweep as a whole; the Ray of a sweep is not kept
    resumes: bool = False

    def compose(self, values: dict[str, Value]) -> Composition:
        """Compose a trial. Raises ConfigError."""
        keys = ",".join(f"'{axis.key}'" for axis in self.words.axes)
        words = [*_of_trials(self.words.trial(values)), f"logging.hparams=[{keys}]"]
        return compose(words, self.request.config_dir, self.stored)

    def headline(self) -> str:
        """Return the one line that a sweep begins with."""
        kind = "grid over" if self.settings.sampler == "grid" else f"{self.settings.sampler} search over"
        keys = ", ".join(axis.key for axis in self.words.axes) or "nothing"
        m = self.plan.machines
        each = f"{m.workers} {'GPU' if m.device == 'cuda' else 'CPU'} worker{'s' if m.workers > 1 else ''}"
        goal = ", ".join(f"{objective.direction} {objective.tag}" for objective in self.objectives)
        trials = f"{self.total} trial{'s' if self.total > 1 else ''}"
        return f"{trials}, a {kind} {keys}; {self.concurrency} at a time on {each} each ({m.description}); {goal}"


def shape_of(machines: Machines) -> Shape:
    return Shape(machines.workers, machines.cpus_per_worker, machines.gpus_per_worker)


def plan_sweep(request: Request, observer: Observer) -> Planned:
    """Work out what the words of `launch -m` ask for.

    Raises:
        ConfigError, TrustError: a word cannot be read, swept or searched, or a trial cannot be composed.
        RunError: the sweep exists already, does not exist, is running, or cannot be continued with these words.
        ResourceError: a trial is larger than what is there.
    """
    if ranks.in_environment() is not None:
        raise ConfigError(
            "A sweep starts its own workers, and torchrun or srun has started some already: call launch -m by itself."
        )
    targets.add_calling_directory(request.calling)
    words = syntax.plain_words(request.words)
    run = peek([word for word in words if key_of(word).startswith("run.")], request.config_dir, "run")
    check_run(run)
    if is_uri(run.root):
        raise ConfigError(
            f"run.root={run.root}: a sweep keeps its study in a directory, which an object store does not serve. Give "
            "a path that all machines share, and copy the best run when it is done."
        )
    root = root_of(run.root)
    if run.resume is not False and run.name is not None:
        directory = RunDirectory(root / run.name)
        if (directory.path / JOURNAL).is_file():
            return _continued(request, words, directory, observer)
        if directory.exists():
            raise RunError(f'"{run.name}" is a single run: continue it without -m.')
        if run.resume is True:
            runs.find(root, run.name)  # raises, and names the nearest
    if run.name is not None and (root / run.name).exists():
        raise RunError(
            f'"{run.name}" exists already in {root}. Continue it with run.resume=true, or choose another run.name.'
        )
    return _plan(request, words, None if run.name is None else RunDirectory(root / run.name), root, observer)


def _continued(request: Request, words: list[str], directory: RunDirectory, observer: Observer) -> Planned:
    name = directory.name
    if directory.status() == "running":
        raise RunError(f'The sweep "{name}" is running. Stop it with: launch stop {name}.')
    mend(directory.path)
    before = recorded(directory.path)
    if request.config_dir is None and before.config_dir is not None:
        request = replace(request, config_dir=Path(before.config_dir))
    merged = _merged(before.words, words, name)
    planned = _plan(request, merged, directory, directory.path.parent, observer)
    check_budget(directory, directory.result(), planned.plan.rate)
    return replace(planned, resumes=True)


def _merged(before: Sequence[str], given: Sequence[str], name: str) -> list[str]:
    """Return the words of the sweep with those given now: its settings may change, its trials must stay comparable."""
    words = list(before)
    for word in given:
        key = key_of(word)
        if shown(word) in words:  # a secret was not kept, and is given again
            words[words.index(shown(word))] = word
        elif key in ("sweep", "verbose", "cluster.budget_usd") or key.startswith("sweep."):
            words = [other for other in words if key_of(other) != key] + [word]
        elif not key.startswith("run."):
            raise RunError(
                f'The sweep "{name}" cannot be continued with {shown(word)}: its trials would no longer be comparable. '
                "Leave the word out (sweep.*, cluster.budget_usd and verbose may change), or start a new sweep."
            )
    return words


def _plan(
    request: Request, words: list[str], directory: RunDirectory | None, root: Path, observer: Observer
) -> Planned:
    stored = _like(words, root)
    if stored is not None:
        words = [word for word in words if key_of(word) != "run.like"]
    groups = sources(request.config_dir).groups()
    space = syntax.read(words, {}, groups)
    first = compose(_of_trials(space.first()), request.config_dir, stored)
    seed = first.job.sweep.seed
    params = first.sweeper.get("params") or {}
    if params or seed:
        space = syntax.read(words, params, groups, seed)
        first = compose(_of_trials(space.first()), request.config_dir, stored)
    settings = _settings(first, space)
    objectives = _objectives(first, settings)
    total = _total(settings, space)
    _check_searchable(settings, space, objectives)
    if directory is None:
        directory = _unused(root, default_run_name(first.choices, datetime.now()))
    shapes = [shape_of(machines_of(first.job))]
    for others in _samples(space):
        shapes.append(shape_of(machines_of(compose(_of_trials(others), request.config_dir, stored).job)))
    if first.job.scaling.heal:
        raise ConfigError(
            "scaling.heal=true was asked for with a sweep, whose trials share their workers. Leave it out: a trial "
            "that loses a worker fails by itself and the others go on."
        )
    plan = checked_plan(first.job, observer)
    for objective in objectives:
        if objective.tag not in plan.tags:
            raise ConfigError(
                f"sweep.metric={objective.tag}: the job logs no such tag.{did_you_mean(objective.tag, plan.tags)} "
                f"It logs {', '.join(plan.tags)}."
            )
    return Planned(
        request=request,
        directory=directory,
        words=space,
        settings=settings,
        objectives=objectives,
        plan=plan,
        total=total,
        concurrency=_concurrency(plan.machines, settings, total),
        evaluations=_evaluations(first, plan, objectives[0]),
        stored=stored,
        recorded=Recorded(
            tuple(shown(word) for word in words), str(request.config_dir) if request.config_dir else None
        ),
        sweeper=first.sweeper,
        cluster=replace(first.job.cluster, keep_minutes=0.0),
    )


def _like(words: Sequence[str], root: Path) -> Path | None:
    name = next((word.partition("=")[2] for word in words if key_of(word) == "run.like"), None)
    return None if name is None else run_like(str(root), name).config


def _of_trials(words: Sequence[str]) -> list[str]:
    """Leave out what belongs to the sweep: a trial's name is its number."""
    return [word for word in words if not key_of(word).startswith("run.")]


def _settings(first: Composition, space: Words) -> SweepConfig:
    settings = first.job.sweep
    chosen = {"sweep", "sweep.sampler"} & first.given
    if settings.sampler == "grid" and settings.trials is not None and not space.finite and not chosen:
        return replace(settings, sampler="tpe")  # so many trials of something endless: a search was meant
    return settings


def _objectives(first: Composition, settings: SweepConfig) -> tuple[Objective, ...]:
    checkpoint = first.job.checkpoint
    tags = settings.metric if isinstance(settings.metric, list) else [settings.metric or checkpoint.monitor]
    given = settings.direction
    directions: list[Any] = list(given) if isinstance(given, list) else [given] * len(tags)
    if not tags or not all(isinstance(tag, str) for tag in tags):
        raise ConfigError("The sweep needs to know what is best: sweep.metric=TAG (checkpoint.monitor is null).")
    if len(directions) != len(tags):
        raise ConfigError(
            f"sweep.metric has {len(tags)} tags and sweep.direction {len(directions)}: give one for each."
        )
    default = [checkpoint.mode if tag == checkpoint.monitor else "min" for tag in tags]
    found = zip(tags, directions, default, strict=True)
    return tuple(Objective(tag, direction or usual) for tag, direction, usual in found)


def _total(settings: SweepConfig, space: Words) -> int:
    distributions(space, settings.sampler == "grid")  # raises for what has no grid
    if settings.sampler == "grid":
        if settings.trials is not None:
            raise ConfigError(
                f"sweep.trials={settings.trials}: a grid has as many trials as combinations. Leave it out, or "
                "search: sweep=random, tpe, gp or cmaes."
            )
        total = 1
        for axis in space.axes:
            total *= len(axis.values) if isinstance(axis, Choice) else 1
        if total > 100_000:
            raise ConfigError(f"The grid has {total:,} trials. Search instead: sweep=tpe sweep.trials=100.")
        return total
    if settings.trials is None:
        raise ConfigError(f"sweep={settings.sampler} searches for as long as it is told: add sweep.trials=20.")
    if not space.axes:
        raise ConfigError(
            f"sweep={settings.sampler} has nothing to search over: give a key several values, such as "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))'."
        )
    return settings.trials


def _check_searchable(settings: SweepConfig, space: Words, objectives: Sequence[Objective]) -> None:
    sampler(settings, space, 0)
    if len(objectives) > 1 and settings.pruner != "none":
        raise ConfigError("sweep.pruner needs one objective: leave it out, or give a single sweep.metric.")
    if len(objectives) > 1 and settings.sampler in ("cmaes", "gp"):
        raise ConfigError(f"sweep={settings.sampler} has one objective. For several use sweep=nsga2.")


def _samples(space: Words) -> Iterator[list[str]]:
    """Yield words of trials that are composed to find mistakes: each text once, of many numbers the ends, all sizes."""
    first = next(iter(grid(space.with_first_only())))
    for axis in space.axes:
        if not axis.key.startswith(SIZES):
            for value in axis.samples()[1:]:
                yield space.trial({**first, axis.key: value})
    sizes = [axis for axis in space.axes if axis.key.startswith(SIZES)]
    for values in itertools.islice(itertools.product(*(axis.samples(all_of=True) for axis in sizes)), 1, _MOST_SIZES):
        yield space.trial({**first, **dict(zip((axis.key for axis in sizes), values, strict=True))})


def _concurrency(machines: Machines, settings: SweepConfig, total: int) -> int:
    if machines.cluster == "none":
        return 1
    most, shape, count = min(settings.concurrency or total, total), shape_of(machines), 1
    while count < most and fits([shape] * (count + 1), machines.cpus, machines.gpus):
        count += 1
    return count


def _evaluations(first: Composition, plan: Plan, objective: Objective) -> int | None:
    trainer = first.job.trainer
    key = "evaluate_every" if objective.tag.startswith("val/") else "log_every"
    interval = parse_interval(getattr(trainer, key), f"trainer.{key}")
    if interval.steps is not None:
        return -(-plan.batches.steps // interval.steps)
    if interval.epochs is not None:
        return max(1, -(-int(plan.batches.epochs) // interval.epochs))
    return None


def _unused(root: Path, name: str) -> RunDirectory:
    candidate, number = root / name, 1
    while candidate.exists():
        number += 1
        candidate = root / f"{name}-{number}"
    return RunDirectory(candidate)
