"""Optuna's distributions for a search space: draws of a search, combinations of a grid, and values for display."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from launcher.config import masking
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
