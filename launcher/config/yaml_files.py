"""Reads configuration files as plain data: files of groups, the primary config.yaml, a run's config.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launcher.config import keys, limits, literal_text
from launcher.config.schema import OPEN_SECTIONS, Job
from launcher.config.search_path import Sources
from launcher.errors import ConfigError


def read_first(where: Sources, name: str) -> Mapping[str, Any] | None:
    """Return the plain content of the first file with this name; None if no directory has one."""
    for directory in where.directories:
        if (directory / name).is_file():
            return read_yaml(directory / name)
    return None


def read_yaml(file: Path) -> Mapping[str, Any]:
    """Return the plain content of a file. Raises ConfigError if it is not readable, or not a mapping."""
    try:
        text = limits.read_text(file)
        limits.check_yaml(text, str(file))
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must contain a mapping of keys to values.")
    literal_text.restore(content, text)
    return {str(key): value for key, value in content.items()}


def read_stored(file: Path) -> Mapping[str, Any]:
    """Read a run's config.yaml, which is untrusted: it may contain only sections of the schema."""
    content = dict(read_yaml(file))
    for key in content:
        if key not in {item.name for item in dataclasses.fields(Job)}:
            raise ConfigError(
                f'{file}: there is no key "{key}" in a run\'s configuration.{keys.explain_unknown(key)}', key=key
            )
        if (key in keys.sections() or key in OPEN_SECTIONS) and not isinstance(content[key], (dict, str)):
            raise ConfigError(f"{file}: {key} must be a mapping of keys to values, but is {content[key]!r}.", key=key)
    content.pop("verbose", None)  # it applied to the command, not to the run
    for section, _, name in (key.partition(".") for key in keys.REMOVED):
        if isinstance(content.get(section), dict):
            content[section] = {key: value for key, value in content[section].items() if key != name}
    if isinstance(content.get("run"), dict):
        content["run"] = {k: v for k, v in content["run"].items() if k not in ("name", "resume", "like")}
    return content


def where_trusted(where: Sources, stored: Path | None) -> str:
    """Return the file that sets `trust`, for an error."""
    if stored is not None:
        return f"in {stored}"
    for directory in where.directories:
        for file in sorted(directory.rglob("*.yaml")):
            if file.is_file() and "trust" in read_yaml(file):
                return f"in {file}"
    return "by a file"
