"""The search space of a sweep: its fixed words, its axes, and the conditions under which an axis exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = bool | int | float | str | None


@dataclass(frozen=True)
class ChoiceAxis:
    """A key that is swept over a list of values.

    Attributes:
        texts: how each of the `values` is written in an override.
        step: distance between the values if they are a range of numbers that was not shuffled, else None.
        log: whether a range is sampled on a logarithmic scale.
    """

    key: str
    values: tuple[Value, ...]
    texts: tuple[str, ...]
    step: float | None = None
    log: bool = False

    def text(self, value: Value) -> str:
        """Return how `value` is written in an override."""
        for own, text in zip(self.values, self.texts, strict=True):
            if is_same(own, value):
                return text
        return plain_text(value)

    def samples(self, complete: bool = False) -> list[Value]:
        """Return the values to check by composition: all, or of more than three numbers the first and the extremes."""
        numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if complete or len(numbers) < len(self.values) or len(numbers) <= 3:
            return list(self.values)
        return list(dict.fromkeys([self.values[0], min(numbers), max(numbers)]))


@dataclass(frozen=True)
class IntervalAxis:
    """A key that is swept over all numbers from `low` to `high`; over integers only if `whole`."""

    key: str
    low: float
    high: float
    whole: bool = False
    log: bool = False

    def text(self, value: Value) -> str:
        """Return how `value` is written in an override."""
        return plain_text(value)

    def samples(self, complete: bool = False) -> list[Value]:
        """Return the values to check by composition: both ends."""
        return [int(end) if self.whole else float(end) for end in (self.low, self.high)]


Axis = ChoiceAxis | IntervalAxis


@dataclass(frozen=True)
class Condition:
    """The condition under which an axis exists: the axis `parent` has one of `values`."""

    parent: str
    values: tuple[Value, ...]

    def holds(self, values: Mapping[str, Value]) -> bool:
        return any(is_same(values.get(self.parent), value) for value in self.values)


@dataclass(frozen=True)
class SearchSpace:
    """The words of a sweep: `fixed` ones, which all trials have, and `axes`, which are swept.

    Attributes:
        conditions: the condition of each axis that does not exist in all trials, by key.
        over: keys of the axes whose values repeat a trial (`sweep.over`).
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    over: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        return all(isinstance(axis, ChoiceAxis) for axis in self.axes)

    @property
    def keys(self) -> list[str]:
        return [axis.key for axis in self.axes]

    def is_active(self, key: str, values: Mapping[str, Value]) -> bool:
        """Return whether an axis exists in a trial with these values."""
        return key not in self.conditions or self.conditions[key].holds(values)

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return `values` without the axes that do not exist with them."""
        return {key: value for key, value in values.items() if self.is_active(key, values)}

    def first_values(self) -> dict[str, Value]:
        """Return the first value of every axis, whether it exists with the others or not."""
        return {axis.key: axis.samples()[0] for axis in self.axes}

    def first(self) -> list[str]:
        """Return the words of one trial, to determine the settings of the sweep."""
        return self.trial(self.active(self.first_values()))

    def trial(self, values: Mapping[str, Value]) -> list[str]:
        """Return the words of the trial with these values."""
        return [*self.fixed, *self.overrides(values)]

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """Return the words of the swept keys of a trial."""
        return [f"{axis.key}={axis.text(values[axis.key])}" for axis in self.axes if axis.key in values]


def plain_text(value: Value) -> str:
    """Return a value as it is written in Hydra's grammar, in `trials.csv` and in TensorBoard."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_same(one: Value, other: Value) -> bool:
    """Return whether two values have the same type and are equal."""
    return type(one) is type(other) and one == other
