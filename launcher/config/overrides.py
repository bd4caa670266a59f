"""Parses the words of a command line: options of groups, values of keys, and trusted packages.

Each word is checked before Hydra receives it, so that an error names the nearest valid word. Plain Python: the
words arrive parsed (`hydra.core.override_parser.types.Override`) from `launcher.config`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.config import hydra_settings, keys, literal_text, masking
from launcher.errors import ConfigError, TrustError, did_you_mean


@dataclass(frozen=True)
class ParsedOverrides:
    """Checked words in Hydra's form.

    Attributes:
        overrides: the overrides for Hydra.
        groups: the groups for which an option is chosen.
        trust: the packages that the user trusts.
        given: every key and group in the words, without prefixes such as `+`.
        decided: the overrides of the user that may choose where code runs: values of keys, and options of `cluster`.
        options: group -> the chosen option, or a list of them.
    """

    overrides: list[str]
    groups: list[str]
    trust: list[str]
    given: frozenset[str]
    decided: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)


def masked(word: str) -> str:
    """Return a word for the terminal and for files: with literal secrets as ***, and control characters escaped."""
    text = masking.mask_word(word)
    return text if text.isprintable() else repr(text)[1:-1]


def parse_overrides(
    parsed: Sequence[tuple[str, Any]],
    groups: Mapping[str, list[str]],
    listed: frozenset[str] | None,
    own: Container[str] | None = None,
) -> ParsedOverrides:
    """Check each (word, parsed override) and convert the words to Hydra's form.

    groups: every group with its options. listed: the groups of the primary defaults list, None where a run's stored
    configuration takes its place. own: the words that the user typed, where others come from a recorded sweep. Raises
    ConfigError.
    """
    decided: list[str] = []
    overrides: list[str] = []
    chosen: list[str] = []
    trust: list[str] = []
    options: dict[str, Any] = {}
    for word, override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            raise ConfigError(
                f'"{masked(word)}" names several values, which is a sweep: add -m for one run each, '
                f"write {key}=[...] for a list, or quote the value for a text with a comma in it.",
                key=key,
            )
        if word == "hydra/sweeper=launch":
            continue  # it is always used
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise ConfigError(f'"{masked(word)}" has no effect: {hydra_settings.explain(key)}. Leave it out.', key=key)
        typed = own is None or word in own
        if key == "trust":
            if not typed:
                raise TrustError(f'"{masked(word)}" comes from a file. If you trust that code, type it: {masked(word)}')
            trust = _read_trust(override, word)
        elif key in groups and not isinstance(override.value(), dict):
            if not override.package:
                chosen.append(key)
                options[key] = override.value()
            overrides.append(_group_word(override, word, groups, listed))
            if typed and key.partition("/")[0] == "cluster":
                decided.append(overrides[-1] if key == "cluster" else f"+{overrides[-1].lstrip('+')}")
        else:
            _check_key(override, word, groups)
            # `++` overrides an existing key and adds a missing one. The signature of the class decides whether an
            # open section accepts the key, independent of the keys in its YAML file.
            overrides.append(
                word if override.is_delete() else f"++{literal_text.quote(word.lstrip('+'), key, override.value())}"
            )
            if typed and not override.is_delete():
                decided.append(overrides[-1])
    given = frozenset(override.package or override.key_or_group for _, override in parsed)
    return ParsedOverrides(overrides, chosen, trust, given, decided, options)


def not_an_override(word: str, groups: Mapping[str, Any], reason: str) -> str:
    """Return the reason why a word could not be parsed as an override."""
    name, equals, _ = word.partition("=")
    if not equals:
        hint = did_you_mean(word, [*groups, *keys.leaves()]) or keys.explain_unknown(word, groups)
        if word in groups or keys.is_known(word):
            hint = f" For example: {word}={(groups.get(word) or ['VALUE'])[0]}."
        choices = [f"{group}={word}" for group, options in groups.items() if word in options]
        if choices:
            hint = f" Did you mean {' or '.join(choices)}?"
        return f'"{masked(word)}" is not an override: write key=value or group=option.{hint}'
    return (
        f'"{masked(word)}" cannot be read ({reason}). A value with special characters needs quotes of its own inside '
        f"those of the shell, such as '{masked(f'{name}=')}\"VALUE\"'."
    )


def _read_trust(override: Any, word: str) -> list[str]:
    value = override.value()
    names = [value] if isinstance(value, str) else value
    if (
        override.is_delete()
        or not isinstance(names, list)
        or not all(isinstance(name, str) and all(p.isidentifier() for p in name.split(".")) for name in names)
    ):
        raise ConfigError(
            f'"{masked(word)}" must be a list of package names, for example trust=[mypackage].', key="trust"
        )
    return [str(name) for name in names]


def _group_word(override: Any, word: str, groups: Mapping[str, list[str]], listed: frozenset[str] | None) -> str:
    group, value = override.key_or_group, override.value()
    if listed is None and group == "experiment":
        raise ConfigError(
            f'"{masked(word)}" cannot be applied to the configuration of a run that exists: an experiment is a whole '
            "configuration of its own. Give the groups and keys that are to change, or start a new run.",
            key=group,
        )
    if override.is_delete():
        return word
    if value is None:
        return f"~{override.get_key_element().lstrip('+')}"
    for option in value if isinstance(value, list) else [value]:
        name = str(option).removesuffix(".yaml")
        folder, _, stem = f"{group}/{name}".rpartition("/")
        if stem not in groups.get(folder, []):
            raise ConfigError(
                f'"{masked(word)}": there is no {group} called "{name}".{did_you_mean(name, groups[group])} '
                f"There are: {', '.join(groups[group])}.",
                key=group,
            )
    body = word.lstrip("+")
    # `+` is optional: a group of the defaults list is overridden, any other group is added.
    if override.package:
        return word
    return body if listed is None or group in listed else f"+{body}"


def _check_key(override: Any, word: str, groups: Mapping[str, list[str]]) -> None:
    key = override.key_or_group
    if override.package is not None or "/" in key:
        raise ConfigError(
            f'"{masked(word)}": there is no configuration group "{key}".{did_you_mean(key, groups)}', key=key
        )
    if key.startswith("trust."):
        raise ConfigError(f'"{masked(word)}" is not understood: write trust=[PACKAGE].', key=key)
    if keys.is_known(key):
        if override.is_delete() and key.partition(".")[0] not in keys.OPEN_SECTIONS:
            raise ConfigError(
                f'"{masked(word)}": {key} is part of every configuration and cannot be deleted. Set it instead.',
                key=key,
            )
        return
    raise ConfigError(f'"{masked(word)}": there is no key "{key}".{keys.explain_unknown(key, groups)}', key=key)
