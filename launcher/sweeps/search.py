"""From the axes of a sweep to Optuna: distributions, samplers, pruners."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launcher.config import SweepConfig, masking
from launcher.errors import ConfigError
from launcher.sweeps.syntax import Axis, ChoiceAxis, IntervalAxis, SearchSpace, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

# Keys that decide how many workers a trial has, and of what kind. They are the outer loops of a grid, so that trials
# of one size follow each other and a warm group serves them all.
SIZES = "scaling"


def distribution(axis: Axis, grid: bool = False) -> BaseDistribution:
    """Return Optuna's distribution of an axis.

    Args:
        grid: every value is taken in turn, so that a range is a list of values like any other.

    Raises:
        ConfigError: an interval, which has no end of values, in a grid.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, IntervalAxis):
        if grid:
            raise ConfigError(
                f"{axis.key} is swept over an interval, which has no end of values for a grid. Name values "
                f"({axis.key}=A,B or range(…)), or search: sweep=tpe sweep.trials=20."
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
    return {axis.key: distribution(axis, grid) for axis in space.axes}


def grid(space: SearchSpace) -> Iterator[dict[str, Value]]:
    """Yield every combination, the last key fastest, keys of size (workers, devices) slowest."""
    axes = [axis for axis in space.axes if isinstance(axis, ChoiceAxis)]
    axes.sort(key=lambda axis: not axis.key.startswith(SIZES))
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def sampler(settings: SweepConfig, space: SearchSpace, drawn: int) -> BaseSampler:
    """Return Optuna's sampler.

    Args:
        drawn: how many trials have been drawn already: a sweep that is resumed must not draw the same again.

    Raises:
        ConfigError: the search does not fit what is searched.
    """
    from optuna import samplers

    seed = (settings.seed + 1_000_003 * drawn) % 2**32
    name = settings.sampler
    if name == "cmaes" and all(isinstance(axis, ChoiceAxis) and axis.step is None for axis in space.axes):
        raise ConfigError("sweep=cmaes searches over numbers, and only choices are swept. Use sweep=tpe or sweep=grid.")
    kinds: dict[str, Any] = {
        "grid": samplers.RandomSampler,  # the values are there already; nothing is drawn
        "random": samplers.RandomSampler,
        "tpe": samplers.TPESampler,
        "gp": samplers.GPSampler,
        "cmaes": _cmaes(),
        "nsga2": samplers.NSGAIISampler,
    }
    options: dict[str, Any] = {}
    if name == "nsga2" and settings.trials:
        # Generations of 50, Optuna's default, would leave a sweep of 40 trials in its first, random one.
        options["population_size"] = max(4, min(50, settings.trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kinds[name](seed=seed, **options)


def _cmaes() -> type[BaseSampler]:
    """Return Optuna's CMA-ES without the pickle of its optimizer, which a journal from a stranger may hold.

    Its state follows from the trials of each generation, and is computed from them for every draw.
    """
    from optuna.samplers import CmaEsSampler
    from optuna.study import StudyDirection

    class RebuiltCmaEs(CmaEsSampler):
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

    return RebuiltCmaEs


def pruner(settings: SweepConfig, evaluations: int | None) -> BasePruner:
    """Return Optuna's pruner. Its resource is the number of evaluations.

    Args:
        evaluations: how many a whole trial has, None where that is not known beforehand.
    """
    from optuna import pruners

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
    """Return a trial's values as TensorBoard, result.json and trials.csv show them: one type for each key.

    TensorBoard takes the type of a key from all of its values, so numbers and texts never mix under one key.
    """
    found = {axis.key: _of_one_type(axis, values[axis.key]) for axis in space.axes if axis.key in values}
    return {key: masking.mask_at(key, value) for key, value in found.items()}


def _of_one_type(axis: Axis, value: Value) -> Value:
    from launcher.sweeps.syntax import plain_text

    if isinstance(axis, IntervalAxis) or all(isinstance(v, bool) for v in axis.values):
        return value
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in axis.values):
        return value
    return plain_text(value)
