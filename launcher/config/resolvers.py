"""Resolvers of OmegaConf that a user registers: `${name:argument}` in a configuration.

The module `resolvers` of the calling directory registers them, or `PACKAGE.resolvers` of a package in `trust`. It is
imported if a configuration uses a resolver that is not registered. The configuration of a run stores the values of
these resolvers, so that a stored configuration never calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from launcher.config.targets import is_of_calling_directory
from launcher.errors import ConfigError

MODULE = "resolvers"
_BUILT_IN = re.compile(r"oc\..*|hydra|now|python_version")
_NAME = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:")


def import_for(tree: Any, trust: Sequence[str]) -> None:
    """Import the modules that register resolvers, if a configuration uses one that is not registered.

    Args:
        tree: the configuration as plain data, with interpolations as they were written.
        trust: the packages that the user trusts.

    Raises:
        ConfigError: a module cannot be imported, or none of them registers the resolver.
    """
    missing = _missing(tree)
    if not missing:
        return
    for name in ([MODULE] if is_of_calling_directory(MODULE) else []) + [f"{package}.{MODULE}" for package in trust]:
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f'The module "{name}", which registers resolvers, raised {type(error).__name__}: {error} '
                f"({last.filename}, line {last.lineno})."
            ) from error
    if missing := _missing(tree):
        raise ConfigError(
            f'There is no resolver "{missing[0]}" for ${{{missing[0]}:...}}. Register it with '
            f"OmegaConf.register_new_resolver in {MODULE}.py of the calling directory, or in PACKAGE.{MODULE} with "
            "trust=[PACKAGE]."
        )


def with_values(written: Any, resolved: Any) -> Any:
    """Return a configuration in which values of registered resolvers replace their interpolations.

    Args:
        written: plain data with interpolations as they were written.
        resolved: the same data with the values of interpolations.
    """
    if isinstance(written, str):
        return resolved if any(True for _ in _names(written)) else written
    if isinstance(written, Mapping) and isinstance(resolved, Mapping):
        return {key: with_values(value, resolved.get(key)) for key, value in written.items()}
    if isinstance(written, list) and isinstance(resolved, list) and len(written) == len(resolved):
        return [with_values(*pair) for pair in zip(written, resolved, strict=True)]
    return written


def _missing(tree: Any) -> list[str]:
    return [name for name in _names(tree) if not OmegaConf.has_resolver(name)]


def _names(tree: Any) -> Iterator[str]:
    """Yield the names of the resolvers in plain data that OmegaConf and Hydra do not have."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _names(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _names(value)
    elif isinstance(tree, str) and "${" in tree:
        yield from (name for name in _NAME.findall(tree) if not _BUILT_IN.fullmatch(name))
