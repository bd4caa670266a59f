"""Hydra's sweep grammar: converts the words of a command line to the axes of a search space.

    optimizer.lr=1e-3,1e-2    model=choice(mlp,convnet)    model=glob(*)      trainer.epochs=range(1,10,2)
    optimizer.lr=tag(log,interval(1e-4,1e-1))              model.width=int(interval(8,64))

Hydra's parser reads the words. Nothing is composed or sampled here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

from launcher.config import limits
from launcher.config.masking import mask_at
from launcher.config.overrides import masked
from launcher.errors import ConfigError
from launcher.sweeps.space import Axis, ChoiceAxis, IntervalAxis, SearchSpace, Value, is_same, plain_text

PARAMS = "hydra.sweeper.params"
_MOST_VALUES = 100_000


def read(
    words: Sequence[str], params: Mapping[str, Any], groups: Mapping[str, list[str]], seed: int = 0
) -> SearchSpace:
    """Parse the words of a sweep.

    Args:
        words: words of the command line; `hydra.sweeper.params.KEY=SWEEP` is treated as `KEY=SWEEP`. Fixed words for
            one key are kept in order, as without `-m`; a sweep and a fixed word for the same key replace each other.
        params: `hydra.sweeper.params` of the configuration; a word for the same key replaces it.
        groups: the options of every configuration group, for `glob`.
        seed: seed of `shuffle`.

    Raises:
        ConfigError: a word cannot be parsed, or its key cannot be swept.
    """
    given = [_keyed(word) for word in plain_words(words)]
    typed = {key for key, _, _ in given}
    found: list[tuple[str, str, Any]] = []
    for key, word, override in [*(one for one in map(_keyed, words_of(params)) if one[0] not in typed), *given]:
        sweeps = override.is_sweep_override()
        found = [one for one in found if one[0] != key or not (sweeps or one[2].is_sweep_override())]
        found.append((key, word, override))
    fixed, axes = [], []
    for _, word, override in found:
        if override.is_sweep_override():
            axes.append(_axis(override, word, groups, seed))
        else:
            fixed.append(word)
    return SearchSpace(tuple(fixed), tuple(axes))


def _keyed(word: str) -> tuple[str, str, Any]:
    """Return (key, word, Hydra's override) of a word."""
    override = parse(word)
    return override.get_key_element().lstrip("+"), word, override


def words_of(params: Mapping[str, Any]) -> list[str]:
    """Return `hydra.sweeper.params` as words of the command line."""
    return [f"{key}={_param_text(value)}" for key, value in _flat(params).items()]


def _param_text(value: Any) -> str:
    """Return a value of a file in Hydra's grammar. Text is a sweep or a value in this grammar already."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_param_text, value))}]"
    return plain_text(value)


def plain_words(words: Sequence[str]) -> list[str]:
    """Return the words, with words of `hydra.sweeper.params` converted to plain words."""
    return [word for item in words for word in _expand(item)]


# ---- words ----------------------------------------------------------------------------------------------------------


def parse(word: str) -> Any:
    """Return Hydra's `Override` of a word.

    Raises:
        ConfigError: the word is not an override.
    """
    limits.check_word(word)
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(
            f'"{masked(word)}" cannot be parsed as an override or a sweep ({str(error).splitlines()[0]}). Sweeps are '
            "written KEY=A,B  KEY=range(1,5)  KEY=interval(0,1)  KEY=tag(log,interval(1e-4,1e-1))  GROUP=glob(*).",
            key=masked(word.partition("=")[0]),
        ) from None


def _expand(word: str) -> list[str]:
    """Convert `hydra.sweeper.params.KEY=SWEEP` and `hydra.sweeper.params={KEY: SWEEP}` to plain words."""
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
    key = override.get_key_element().lstrip("+")
    if (
        key == "hydra"
        or key.startswith(("hydra.", "hydra/", "run.", "sweep", "cluster"))
        or key in ("trust", "verbose")
    ):
        raise ConfigError(f'"{masked(word)}" cannot be swept: {key} applies to the sweep as a whole.', key=key)
    value = override._value
    if isinstance(value, IntervalSweep):
        return _interval(key, value, word)
    if isinstance(value, Glob):
        options = value.filter(groups.get(key, []))
        if not options:
            known = f"Its options are {', '.join(groups[key])}" if key in groups else "It is not a configuration group"
            raise ConfigError(f'"{masked(word)}" matches no option of {key}. {known}.', key=key)
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
        raise ConfigError(
            f'"{masked(word)}": the first number of an interval, {low}, must be lower than the second, {high}.', key=key
        )
    if log and low <= 0:
        raise ConfigError(
            f'"{masked(word)}": on a logarithmic scale an interval must begin above 0, not at {low}.', key=key
        )
    return IntervalAxis(key, low, high, isinstance(low, int) and isinstance(high, int), log)


def _range(key: str, found: Any, word: str, seed: int) -> ChoiceAxis:
    if not found.step:
        raise ConfigError(f'"{masked(word)}": the step of a range must not be 0.', key=key)
    values = list(itertools.islice(iter(found.range()), _MOST_VALUES + 1))
    if not values:
        raise ConfigError(f'"{masked(word)}" is an empty range: its end, {found.stop}, is excluded.', key=key)
    if len(values) > _MOST_VALUES:
        raise ConfigError(
            f'"{masked(word)}" has more than {_MOST_VALUES:,} values. Use an interval with a search.', key=key
        )
    log = "log" in found.tags
    if log and (found.step != 1 or min(values) <= 0):
        raise ConfigError(
            f'"{masked(word)}": on a logarithmic scale a range must have step 1, not {found.step}, and begin above 0.',
            key=key,
        )
    if found.shuffle:
        random.Random(seed).shuffle(values)
    step = None if found.shuffle else abs(found.step)
    return ChoiceAxis(key, tuple(values), tuple(plain_text(value) for value in values), step, log)


def _choice(key: str, elements: Sequence[Any], word: str) -> ChoiceAxis:
    values: list[Value] = []
    texts = []
    for element in elements:
        text = Override._get_value_element_as_str(element)
        if isinstance(element, Mapping) or (
            isinstance(element, list) and any(isinstance(e, (dict, list)) for e in element)
        ):
            raise ConfigError(
                f'"{masked(word)}": {text} cannot be swept. Sweep its keys separately, or make each variant an option '
                "of a configuration group and sweep over the group.",
                key=key,
            )
        value = text if isinstance(element, list) else element.text if isinstance(element, QuotedString) else element
        if any(is_same(value, other) or value == other for other in values):
            raise ConfigError(
                f'"{masked(word)}" names {text} twice. Remove one; to repeat trials, sweep over trainer.seed=range(5) '
                "with sweep.over=trainer.seed.",
                key=key,
            )
        values.append(value)
        texts.append(text)
    if any(mask_at(key, value) != value for value in values):
        raise ConfigError(
            f"{key} cannot be swept over literal values: it is a secret, and a sweep records the values of every "
            f"trial. Export each secret as an environment variable and sweep over references, "
            f"{key}='${{oc.env:FIRST}}','${{oc.env:SECOND}}'.",
            key=key,
        )
    return ChoiceAxis(key, tuple(values), tuple(texts))
