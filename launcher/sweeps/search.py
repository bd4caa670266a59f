"""Optuna's distributions, samplers and pruners for a search space."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna import Trial, pruners, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from launcher.config import SweepConfig, masking
from launcher.errors import ConfigError
from launcher.sweeps.space import Axis, ChoiceAxis, IntervalAxis, SearchSpace, Value, plain_text

# Keys that determine the number and kind of the workers of a trial. They vary slowest in a grid, so that trials of one
# size follow each other and share a warm group of workers.
SIZES = "scaling"


def distribution(axis: Axis, grid: bool = False) -> BaseDistribution:
    """Return Optuna's distribution of an axis.

    Args:
        grid: every value is used, so a range is a list of values.

    Raises:
        ConfigError: an interval in a grid.
    """
    if isinstance(axis, IntervalAxis):
        if grid:
            raise ConfigError(
                f"{axis.key} is swept over an interval, which has infinitely many values for a grid. List values "
                f"({axis.key}=A,B or range(…)), or search: sweep=tpe sweep.trials=20.",
                key=axis.key,
            )
        if axis.whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    if grid or axis.step is None:
        return CategoricalDistribution(axis.values)
    numbers = [value for value in axis.values if isinstance(value, (int, float))]
    low, high = min(numbers), max(numbers)
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), log=axis.log, step=int(axis.step))
    return FloatDistribution(low, high, step=float(axis.step))


def distributions(space: SearchSpace, grid: bool) -> dict[str, BaseDistribution]:
    """Return the distribution of every axis, those with a condition last. Repeated axes are categorical."""
    axes = sorted(space.axes, key=lambda axis: axis.key in space.conditions)
    return {axis.key: distribution(axis, grid or axis.key in space.over) for axis in axes}


def draw(trial: Trial, space: SearchSpace, drawn_from: Mapping[str, BaseDistribution]) -> dict[str, Value]:
    """Sample the axes of a trial, or use the values that it was enqueued with. Axes that do not exist are skipped."""
    values: dict[str, Value] = {}
    for key, one in drawn_from.items():
        if not space.is_active(key, values):
            continue
        if isinstance(one, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, one.choices)
        elif isinstance(one, IntDistribution):
            values[key] = trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
        else:
            assert isinstance(one, FloatDistribution)
            values[key] = trial.suggest_float(key, one.low, one.high, step=one.step, log=one.log)
    return values


def grid(space: SearchSpace) -> Iterator[dict[str, Value]]:
    """Yield every combination once. Keys of size vary slowest, repeated keys fastest, then the last key."""
    axes = [axis for axis in space.axes if isinstance(axis, ChoiceAxis)]
    axes.sort(key=lambda axis: (not axis.key.startswith(SIZES), axis.key in space.over))
    seen = set()
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = space.active(dict(zip((axis.key for axis in axes), combination, strict=True)))
        if space.conditions:
            identity = repr(values)
            if identity in seen:
                continue
            seen.add(identity)
        yield values


def sampler(settings: SweepConfig, space: SearchSpace, drawn: int, prior: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """Return Optuna's sampler.

    Args:
        drawn: number of trials so far, so that a resumed sweep does not sample the same values again.
        prior: trials of another sweep in the study, from which the sampler learns.

    Raises:
        ConfigError: the sampler does not support the search space.
    """
    seed = (settings.seed + 1_000_003 * drawn) % 2**32
    name = settings.sampler
    if name == "cmaes" and all(isinstance(axis, ChoiceAxis) and axis.step is None for axis in space.axes):
        raise ConfigError("sweep=cmaes searches over numbers, but only choices are swept. Use sweep=tpe or sweep=grid.")
    kinds: dict[str, Any] = {
        "grid": samplers.RandomSampler,  # not used: all trials are enqueued with their values
        "random": samplers.RandomSampler,
        "tpe": samplers.TPESampler,
        "gp": samplers.GPSampler,
        "cmaes": RebuiltCmaEs,
        "nsga2": samplers.NSGAIISampler,
    }
    options: dict[str, Any] = {}
    if name == "nsga2" and settings.trials:
        # With Optuna's default of 50, a sweep of 40 trials would only have its first, random generation.
        options["population_size"] = max(4, min(50, settings.trials // 4))
    if name == "cmaes" and prior:
        options["source_trials"] = list(prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kinds[name](seed=seed, **options)


class RebuiltCmaEs(CmaEsSampler):
    """Optuna's CMA-ES without the pickled optimizer in the journal, which could execute code when it is read.

    The state follows from the trials of each generation, and is recomputed from them for every draw.
    """

    def _restore_optimizer(self, completed_trials: list[Any]) -> None:
        self._completed = completed_trials

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        optimizer = super()._init_optimizer(trans, direction)
        sign = 1 if direction == StudyDirection.MINIMIZE else -1
        size = optimizer.population_size
        while len(found := self._get_solution_trials(self._completed, optimizer.generation)) >= size:
            optimizer.tell([(trans.transform(trial.params), sign * (trial.value or 0.0)) for trial in found[:size]])
        return optimizer


def pruner(settings: SweepConfig, evaluations: int | None) -> BasePruner:
    """Return Optuna's pruner, whose resource is the number of evaluations.

    Args:
        evaluations: number of evaluations of a complete trial, None if unknown.
    """
    least, reduction = settings.min_evaluations, settings.reduction
    if settings.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=reduction)
    if settings.pruner == "hyperband":
        most = "auto" if evaluations is None else max(evaluations, least)
        return pruners.HyperbandPruner(min_resource=least, max_resource=most, reduction_factor=reduction)
    if settings.pruner == "median":
        return pruners.MedianPruner(n_warmup_steps=least)
    return pruners.NopPruner()


def display_values(values: Mapping[str, Value], space: SearchSpace) -> dict[str, Value]:
    """Return a trial's values for TensorBoard, result.json and trials.csv, with one type for each key.

    TensorBoard determines the type of a key from all of its values, so a key must not have both numbers and texts.
    """
    found = {axis.key: _of_one_type(axis, values[axis.key]) for axis in space.axes if axis.key in values}
    return {key: masking.mask_at(key, value) for key, value in found.items()}


def _of_one_type(axis: Axis, value: Value) -> Value:
    if isinstance(axis, IntervalAxis) or all(isinstance(v, bool) for v in axis.values):
        return value
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in axis.values):
        return value
    return plain_text(value)
