"""Repeats: trials that differ only in the keys of `sweep.over`, summarized by mean and spread of their objectives."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from launcher.sweeps.space import ChoiceAxis, SearchSpace, Value


@dataclass
class Repeats:
    """The trials of one combination of the keys that are not repeated.

    Attributes:
        values: the combination.
        total: number of trials in which it is repeated; a search that samples it twice repeats it twice.
        objectives: objective of each completed trial, by number.
        used: values of the repeated keys of the trials so far.
    """

    values: dict[str, Value]
    total: int
    objectives: dict[int, float] = field(default_factory=dict)
    used: list[dict[str, Value]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all repeats are completed, so that the mean can be compared with others."""
        return len(self.objectives) == len(self.used) and len(self.used) % self.total == 0

    @property
    def mean(self) -> float:
        """Mean objective of the completed trials; NaN if there are none."""
        return statistics.fmean(self.objectives.values()) if self.objectives else math.nan

    @property
    def spread(self) -> float | None:
        """Sample standard deviation (n - 1) of the objectives; None for fewer than two completed trials."""
        return statistics.stdev(self.objectives.values()) if len(self.objectives) > 1 else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the summary for best.yaml, result.json and the Python API."""
        return {"mean": self.mean, "spread": self.spread, "repeats": len(self.objectives)}


def combinations(space: SearchSpace) -> Iterator[dict[str, Value]]:
    """Yield the combinations of the values of the repeated keys; one empty combination without repeated keys."""
    axes = [axis for axis in space.axes if isinstance(axis, ChoiceAxis) and axis.key in space.over]
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def group(space: SearchSpace, trials: Iterable[tuple[int, Mapping[str, Value], float | None]]) -> dict[int, Repeats]:
    """Return the repeats to which each trial belongs, by number.

    Args:
        trials: (number, values, objective) of each trial; the objective is None unless the trial is completed.
    """
    total = sum(1 for _ in combinations(space))
    groups: dict[str, Repeats] = {}
    found = {}
    for number, values, objective in trials:
        own = {key: value for key, value in values.items() if key not in space.over}
        repeats = found[number] = groups.setdefault(repr(sorted(own.items())), Repeats(own, total))
        repeats.used.append({key: values[key] for key in space.over if key in values})
        if objective is not None:
            repeats.objectives[number] = objective
    return found


def missing(space: SearchSpace, groups: Iterable[Repeats]) -> dict[str, Value] | None:
    """Return the values of the next repeat of a combination that is not repeated completely; None if there is none."""
    for repeats in groups:
        if position := len(repeats.used) % repeats.total:
            return {**repeats.values, **next(itertools.islice(combinations(space), position, None))}
    return None
