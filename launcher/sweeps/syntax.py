"""Hydra's sweep grammar: from the words of a command line to the axes of a search space.

    optimizer.lr=1e-3,1e-2    model=choice(mlp,convnet)    model=glob(*)      trainer.epochs=range(1,10,2)
    optimizer.lr=tag(log,interval(1e-4,1e-1))              model.width=int(interval(8,64))

Hydra parses, here is only read what it found. Nothing is composed and nothing is drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config import limits
from launcher.config.masking import mask_at
from launcher.config.overrides import masked
from launcher.errors import ConfigError

Value = bool | int | float | str | None

PARAMS = "hydra.sweeper.params"
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class ChoiceAxis:
    """Values one by one. `texts` is how each is written in an override.

    `step`: set where the values are numbers so far apart (a range that was not shuffled).
    """

    key: str
    values: tuple[Value, ...]
    texts: tuple[str, ...]
    step: float | None = None
    log: bool = False

    def text(self, value: Value) -> str:
        """Return how `value` is written in an override."""
        for own, text in zip(self.values, self.texts, strict=True):
            if _same(own, value):
                return text
        return plain_text(value)

    def samples(self, all_of: bool = False) -> list[Value]:
        """Return what is worth trying to compose: of many numbers the first and the ends, else every value."""
        numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if all_of or len(numbers) < len(self.values) or len(numbers) <= 3:
            return list(self.values)
        return list(dict.fromkeys([self.values[0], min(numbers), max(numbers)]))


@dataclass(frozen=True)
class IntervalAxis:
    """All numbers from `low` to `high`, whole ones where `whole`."""

    key: str
    low: float
    high: float
    whole: bool = False
    log: bool = False

    def text(self, value: Value) -> str:
        return plain_text(value)

    def samples(self, all_of: bool = False) -> list[Value]:
        return [int(end) if self.whole else float(end) for end in (self.low, self.high)]


Axis = ChoiceAxis | IntervalAxis


@dataclass(frozen=True)
class SearchSpace:
    """What the words of a sweep ask for: `fixed` holds for every trial, each of `axes` is swept."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def finite(self) -> bool:
        return all(isinstance(axis, ChoiceAxis) for axis in self.axes)

    def first(self) -> list[str]:
        """Return the words of one trial, for what must be known before any is drawn."""
        return self.trial({axis.key: axis.samples()[0] for axis in self.axes})

    def trial(self, values: Mapping[str, Value]) -> list[str]:
        """Return the words of the trial with these values."""
        return [*self.fixed, *self.overrides(values)]

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """Return the words of the swept keys alone."""
        return [f"{axis.key}={axis.text(values[axis.key])}" for axis in self.axes]

    def with_first_only(self) -> SearchSpace:
        """Return the words with one value on each axis."""
        values = {axis.key: axis.samples()[0] for axis in self.axes}
        axes = tuple(ChoiceAxis(key, (value,), (plain_text(value),)) for key, value in values.items())
        return SearchSpace(self.fixed, axes)


def read(
    words: Sequence[str], params: Mapping[str, Any], groups: Mapping[str, list[str]], seed: int = 0
) -> SearchSpace:
    """Read the words of a sweep.

    Args:
        words: as given on the command line; `hydra.sweeper.params.KEY=SWEEP` among them counts as `KEY=SWEEP`.
        params: `hydra.sweeper.params` of the configuration; a word for the same key wins over it.
        groups: every configuration group with its options, for `glob`.
        seed: what `shuffle` shuffles by.

    Raises:
        ConfigError: a word cannot be read, or cannot be swept.
    """
    given = plain_words(words)
    from_params = words_of(params)
    overrides: dict[str, tuple[str, Any]] = {}
    for word in [*from_params, *given]:
        override = parse(word)
        name = override.get_key_element().lstrip("+")
        overrides.pop(name, None)  # the later one holds, at its own place
        overrides[name] = (word, override)
    fixed, axes = [], []
    for word, override in overrides.values():
        if override.is_sweep_override():
            axes.append(_axis(override, word, groups, seed))
        else:
            fixed.append(word)
    return SearchSpace(tuple(fixed), tuple(axes))


def words_of(params: Mapping[str, Any]) -> list[str]:
    """Return `hydra.sweeper.params` as words of the command line."""
    return [f"{key}={value}" for key, value in _flat(params).items()]


def plain_words(words: Sequence[str]) -> list[str]:
    """Return the words with `hydra.sweeper.params` among them written as plain words."""
    return [word for item in words for word in _unfolded(item)]


def plain_text(value: Value) -> str:
    """Return a value as Hydra's grammar, `trials.csv` and TensorBoard write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- words ----------------------------------------------------------------------------------------------------------


def parse(word: str) -> Any:
    """Return what Hydra parses a word to. ConfigError where it is no override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    limits.check_word(word)
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(
            f'"{masked(word)}" cannot be read as an override or a sweep ({str(error).splitlines()[0]}). Sweeps are '
            "written KEY=A,B  KEY=range(1,5)  KEY=interval(0,1)  KEY=tag(log,interval(1e-4,1e-1))  GROUP=glob(*)."
        ) from None


def _unfolded(word: str) -> list[str]:
    """Return `hydra.sweeper.params.KEY=SWEEP` and `hydra.sweeper.params={KEY: SWEEP}` as plain words."""
    name, _, value = word.lstrip("+").partition("=")
    if name.startswith(f"{PARAMS}."):
        return [f"{name.removeprefix(f'{PARAMS}.')}={value}"]
    if name != PARAMS:
        return [word]
    content = parse(word).value()
    if not isinstance(content, dict):
        raise ConfigError(
            f'"{masked(word)}" must be a mapping of keys to sweeps, such as {PARAMS}.optimizer.lr=1e-3,1e-2.'
        )
    return [f"{key}={text}" for key, text in _flat(content).items()]


def _flat(params: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in params.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


# ---- axes -----------------------------------------------------------------------------------------------------------


def _axis(override: Any, word: str, groups: Mapping[str, list[str]], seed: int) -> Axis:
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep

    key = override.get_key_element().lstrip("+")
    if (
        key == "hydra"
        or key.startswith(("hydra.", "hydra/", "run.", "sweep", "cluster"))
        or key in ("trust", "verbose")
    ):
        raise ConfigError(f'"{masked(word)}" cannot be swept: {key} belongs to the sweep as a whole.')
    value = override._value
    if isinstance(value, IntervalSweep):
        return _interval(key, value, word)
    if isinstance(value, Glob):
        options = value.filter(groups.get(key, []))
        if not options:
            known = f"There are: {', '.join(groups[key])}." if key in groups else f"{key} is no configuration group."
            raise ConfigError(f'"{masked(word)}" matches nothing. {known}')
        return ChoiceAxis(key, tuple(options), tuple(options))
    if isinstance(value, RangeSweep):
        return _range(key, value, word, seed)
    elements = list(value.list)
    if value.shuffle:
        random.Random(seed).shuffle(elements)
    return _choice(key, elements, word)


def _interval(key: str, found: Any, word: str) -> IntervalAxis:
    low, high, log = found.start, found.end, "log" in found.tags
    if low is None or high is None or not low < high:
        raise ConfigError(f'"{masked(word)}": an interval goes from a lower to a higher number.')
    if log and low <= 0:
        raise ConfigError(f'"{masked(word)}": on a logarithmic scale an interval begins above zero.')
    return IntervalAxis(key, low, high, isinstance(low, int) and isinstance(high, int), log)


def _range(key: str, found: Any, word: str, seed: int) -> ChoiceAxis:
    if not found.step:
        raise ConfigError(f'"{masked(word)}": the step of a range cannot be zero.')
    values = list(itertools.islice(iter(found.range()), _MOST_VALUES + 1))
    if not values:
        raise ConfigError(f'"{masked(word)}" is empty: a range ends before its second number is reached.')
    if len(values) > _MOST_VALUES:
        raise ConfigError(f'"{masked(word)}" has more than {_MOST_VALUES:,} values. Use an interval with a search.')
    log = "log" in found.tags
    if log and (found.step != 1 or min(values) <= 0):
        raise ConfigError(f'"{masked(word)}": on a logarithmic scale a range has the step 1 and begins above zero.')
    if found.shuffle:
        random.Random(seed).shuffle(values)
    step = None if found.shuffle else abs(found.step)
    return ChoiceAxis(key, tuple(values), tuple(plain_text(value) for value in values), step, log)


def _choice(key: str, elements: Sequence[Any], word: str) -> ChoiceAxis:
    from hydra.core.override_parser.types import Override, QuotedString

    values: list[Value] = []
    texts = []
    for element in elements:
        text = Override._get_value_element_as_str(element)
        if isinstance(element, Mapping) or (
            isinstance(element, list) and any(isinstance(e, (dict, list)) for e in element)
        ):
            raise ConfigError(
                f'"{masked(word)}": {text} cannot be searched. Sweep its keys one by one, or put each variant into a '
                "file of a configuration group and sweep over the group."
            )
        value = text if isinstance(element, list) else element.text if isinstance(element, QuotedString) else element
        if any(_same(value, other) or value == other for other in values):
            raise ConfigError(f'"{masked(word)}" names {text} twice.')
        values.append(value)
        texts.append(text)
    if any(mask_at(key, value) != value for value in values):
        raise ConfigError(
            f"{key} cannot be swept over literal values: it holds a secret, and a sweep records the values of every "
            f"trial. Export each secret as a variable of the environment and sweep over references to them, "
            f"{key}='${{oc.env:FIRST}}','${{oc.env:SECOND}}'."
        )
    return ChoiceAxis(key, tuple(values), tuple(texts))


def _same(one: Value, other: Value) -> bool:
    return type(one) is type(other) and one == other
