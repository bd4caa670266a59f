"""The settings of a sweep, read from the section `sweep` for a search space: sampler, objectives, number of trials."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.config import Composition, SweepConfig
from launcher.errors import ConfigError, did_you_mean
from launcher.jobs.prepare import where_others_are
from launcher.sweeps import warm_start
from launcher.sweeps.algorithms import learns_from_others, name_of, pruner, sampler, supports_objectives
from launcher.sweeps.repeats import combinations
from launcher.sweeps.search import distributions, grid
from launcher.sweeps.space import ChoiceAxis, Condition, SearchSpace
from launcher.sweeps.study import Objective
from launcher.sweeps.warm_start import WarmStart

_MOST_TRIALS = 100_000


def settings_of(first: Composition, space: SearchSpace) -> SweepConfig:
    """Return the section `sweep` of the first trial. A number of trials over intervals implies a sampler."""
    settings = first.job.sweep
    chosen = {"sweep", "sweep.sampler"} & first.given
    if settings.sampler == "grid" and settings.trials is not None and not space.finite and not chosen:
        return replace(settings, sampler="tpe")  # a number of trials over an interval implies a search
    return settings


def repeated_keys(settings: SweepConfig, space: SearchSpace, conditions: Mapping[str, Condition]) -> tuple[str, ...]:
    """Return the keys of `sweep.over`. Raises ConfigError if one is not swept over a list of values in every trial."""
    keys = [settings.over] if isinstance(settings.over, str) else list(settings.over or ())
    axes = {axis.key: axis for axis in space.axes}
    for key in keys:
        if key not in axes:
            raise ConfigError(
                f"sweep.over={key} repeats trials over a swept key, but {key} is not swept. Add for example "
                f"{key}=range(3).{did_you_mean(key, list(axes))}",
                key="sweep.over",
            )
        if not isinstance(axes[key], ChoiceAxis):
            raise ConfigError(
                f"sweep.over={key} needs a list of values, but {key} is swept over an interval. Use {key}=A,B or "
                f"{key}=range(3).",
                key="sweep.over",
            )
        if key in conditions:
            raise ConfigError(
                f"sweep.over={key} cannot be used, because not every option of {conditions[key].parent} has {key}. Use "
                "a key that all trials have, such as trainer.seed.",
                key="sweep.over",
            )
    return tuple(keys)


def objectives_of(first: Composition, settings: SweepConfig) -> tuple[Objective, ...]:
    """Return the objectives. Raises ConfigError if there is none, or if tags and directions do not correspond."""
    checkpoint = first.job.checkpoint
    tags = settings.metric if isinstance(settings.metric, list) else [settings.metric or checkpoint.monitor]
    given = settings.direction
    directions: list[Any] = list(given) if isinstance(given, list) else [given] * len(tags)
    if not tags or not all(isinstance(tag, str) for tag in tags):
        raise ConfigError(
            "The sweep has no objective, because checkpoint.monitor is null. Set sweep.metric=TAG.", key="sweep.metric"
        )
    if len(directions) != len(tags):
        raise ConfigError(
            f"sweep.metric has {len(tags)} tags, but sweep.direction has {len(directions)}. Set one for each tag.",
            key="sweep.metric",
        )
    default = [checkpoint.mode if tag == checkpoint.monitor else "min" for tag in tags]
    found = zip(tags, directions, default, strict=True)
    return tuple(Objective(tag, direction or usual) for tag, direction, usual in found)


def number_of_trials(settings: SweepConfig, space: SearchSpace) -> int:
    """Return the number of trials. Raises ConfigError if it is not defined, too large, or nothing is searched."""
    distributions(space, settings.sampler == "grid")  # raises an error for an interval in a grid
    repeats = sum(1 for _ in combinations(space))
    if settings.sampler == "grid":
        if settings.trials is not None:
            raise ConfigError(
                f"sweep.trials={settings.trials} does not apply to a grid, which has one trial per combination. Remove "
                "it, or search: sweep=random, tpe, gp or cmaes.",
                key="sweep.trials",
            )
        total = sum(1 for _ in itertools.islice(grid(space), _MOST_TRIALS + 1))
        if total > _MOST_TRIALS:
            raise ConfigError(
                f"The grid has more than {_MOST_TRIALS:,} trials. Search instead: sweep=tpe sweep.trials=100."
            )
        return total
    if settings.trials is None:
        raise ConfigError(
            f"sweep={name_of(settings.sampler)} needs the number of trials. Add for example sweep.trials=20.",
            key="sweep.trials",
        )
    if len(space.axes) == len(space.over):
        raise ConfigError(
            f"sweep={name_of(settings.sampler)} has no key to search over. Sweep a key, such as "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))'."
        )
    return settings.trials * repeats


def warm_start_of(
    settings: SweepConfig, space: SearchSpace, objectives: Sequence[Objective], root: str, trust: Sequence[str]
) -> WarmStart | None:
    """Return the trials of `sweep.warm_start`. Raises ConfigError or RunError if they cannot be used."""
    name = settings.warm_start
    if name is None:
        return None
    if not learns_from_others(settings, trust):
        raise ConfigError(
            f"sweep.warm_start={name} has no effect with sweep={name_of(settings.sampler)}, which does not learn from "
            "trials of another sweep. Use sweep=tpe, gp or cmaes, or remove sweep.warm_start.",
            key="sweep.warm_start",
        )
    return warm_start.read(where_others_are(root), name, space, distributions(space, grid=False), objectives)


def check_searchable(
    settings: SweepConfig, space: SearchSpace, objectives: Sequence[Objective], trust: Sequence[str]
) -> None:
    """Raise ConfigError if the sampler or the pruner does not support its options, the search space or the objectives.

    Raises TrustError if `trust` does not name the package of the user's own class.
    """
    sampler(settings, space, 0, trust=trust)
    pruner(settings, None, trust)
    if len(objectives) > 1 and settings.pruner != "none":
        raise ConfigError(
            "sweep.pruner supports one objective. Remove it, or set a single sweep.metric.", key="sweep.pruner"
        )
    if len(objectives) > 1 and not supports_objectives(settings, trust):
        raise ConfigError(
            f"sweep={name_of(settings.sampler)} supports one objective. For several, use sweep=nsga2.",
            key="sweep.sampler",
        )
    if len(objectives) > 1 and space.over:
        raise ConfigError(
            "sweep.over supports one objective. Remove it, or set a single sweep.metric.", key="sweep.over"
        )
