"""Reads the configuration and the words of a run from its directory, for verbs that compare or list runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from launcher.errors import RunError
from launcher.runs import RunDirectory
from launcher.runs.plain_files import read_text


def configuration_of(run: RunDirectory) -> dict[str, Any]:
    """Return the configuration of a run by dotted keys.

    Raises:
        RunError: config.yaml is damaged.
    """
    try:
        content = yaml.safe_load(read(run, "config.yaml"))
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{run.config} is damaged: {reason}. Restore it or remove the run.") from error
    return dict(_flat(content)) if isinstance(content, Mapping) else {}


def _flat(section: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def words_of(run: RunDirectory) -> list[str]:
    """Return the words of the command line of a run; none if overrides.yaml is missing or damaged."""
    try:
        words = yaml.safe_load(read(run, "overrides.yaml"))
    except (yaml.YAMLError, RecursionError):
        return []
    return [str(word) for word in words] if isinstance(words, list) else []


def read(run: RunDirectory, name: str) -> str:
    """Return the text of a file of a run, empty if the run does not have it."""
    try:
        return read_text(run.path / name)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(f"{run.path / name} cannot be read: {error.strerror}. Make it readable for you.") from error
