"""Limits on the size of a configuration, so that an untrusted one cannot exhaust this machine.

A few lines of YAML can expand to billions of values (aliases of aliases), a reference can double its own text, and deep
nesting or a number of thousands of digits overflows its reader. Each limit is far above what a training job needs, and
is checked before the text reaches a parser that is slow or recursive. Errors are ConfigErrors that name the limit.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from launcher.errors import ConfigError

MOST_CHARACTERS = 256 << 10  # of a file
MOST_VALUES = 5_000  # of a file, with every alias written out; Hydra copies a configuration many times
DEEPEST = 64  # levels of nesting
LONGEST_NUMBER = 100  # digits
LONGEST_REFERENCE = 4096  # characters of a value with ${...}, whose parser is slow
LONGEST_KEY = 500  # characters, with dots
LONGEST_WORD = 16_384  # characters of a word of the command line, whose parser is slow too

_NUMBER = re.compile(r"[-+]?\.?[0-9][0-9a-fA-FxXoO_:.eE+-]*")
_OPEN, _CLOSE = frozenset("[{("), frozenset("]})")


def read_text(file: Path) -> str:
    """Return the text of a configuration file. ConfigError if it is too large, OSError if it is not readable."""
    size = file.stat().st_size
    if size > MOST_CHARACTERS * 4:
        raise too_large(str(file), f"has {size:,} bytes", f"{MOST_CHARACTERS:,} characters")
    return file.read_text(encoding="utf-8")


def check_yaml(text: str, name: str) -> None:
    """Check the text of a YAML file against the limits, without building its values.

    Raises:
        ConfigError: it exceeds a limit.
        YAMLError: it is not valid YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise too_large(name, f"has {len(text):,} characters", f"{MOST_CHARACTERS:,} characters")
    total, sizes = 0, dict[str, int]()  # anchor -> number of values
    open_nodes: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_nodes.append((event.anchor, total))
            total += 1
            if len(open_nodes) > DEEPEST:
                raise too_large(name, "is nested too deep", f"{DEEPEST} levels")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, MOST_VALUES)  # without a size: an alias inside its own anchor
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            _check_value(event.value, name, plain=not event.style)
        if total > MOST_VALUES:
            raise too_large(name, "has too many values, with aliases (*name) written out", f"{MOST_VALUES:,} values")


def check_word(word: str) -> None:
    """Check a word of a command line, of overrides.yaml or of a sweep's journal. Raises ConfigError."""
    name = f'The word "{word[:40]}..."'
    if len(word) > LONGEST_WORD:
        raise too_large(name, f"has {len(word):,} characters", f"{LONGEST_WORD:,} characters; put the values in a file")
    if len(word.partition("=")[0]) > LONGEST_KEY:
        raise too_large(name, "has too long a key", f"{LONGEST_KEY} characters")
    _check_depth(word, name)
    for number in _NUMBER.finditer(word):
        if len(number[0]) > LONGEST_NUMBER:
            _check_value(number[0], name, plain=True)
    if "${" in word:
        _check_value(word, name, plain=False)


def _check_depth(text: str, name: str) -> None:
    depth = 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth > DEEPEST:
            raise too_large(name, "is nested too deep", f"{DEEPEST} levels")


def _check_value(value: str, name: str, plain: bool) -> None:
    if plain and len(value) > LONGEST_NUMBER and _NUMBER.fullmatch(value):
        raise too_large(name, f"holds a number of {len(value):,} digits", f"{LONGEST_NUMBER} digits")
    if "${" not in value:
        return
    if len(value) > LONGEST_REFERENCE:
        raise too_large(
            name, f"holds a value with ${{...}} of {len(value):,} characters", f"{LONGEST_REFERENCE:,} characters"
        )
    _check_depth(value, name)


def too_large(name: str, found: str, limit: str) -> ConfigError:
    """Return the error for what exceeds a limit."""
    return ConfigError(f"{name} {found}; the limit for a configuration is {limit}. Make it smaller.")
