"""Registries of strategies and sinks, each of which is one file. Does not import torch.

The modules of a folder register their objects when they are imported; other packages register theirs by entry points.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from launcher.errors import ConfigError, TrustError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name.

    Args:
        folder: the package with the modules that register objects.
        group: the group of the entry points of other packages.
        key: the configuration key that selects an object; for error messages.
    """

    def __init__(self, folder: str, group: str, key: str) -> None:
        self._folder, self._group, self._key = folder, group, key
        self._objects: dict[str, T] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under a name."""

        def add(one: T) -> T:
            self._objects[name] = one
            return one

        return add

    def all(self) -> dict[str, T]:
        """Return all objects that are registered in this process, in the order of registration."""
        if not self._imported:
            self._imported = True
            for module in pkgutil.iter_modules(importlib.import_module(self._folder).__path__):
                importlib.import_module(f"{self._folder}.{module.name}")
        return self._objects

    def get(self, name: str, trust: Collection[str] = ()) -> T:
        """Return the object with that name, also of another package if `trust` names the package.

        Raises:
            ConfigError: no such object exists, or it cannot be imported.
            TrustError: its package is not trusted.
        """
        if name in self.all():
            return self._objects[name]
        found = {point.name: point for point in entry_points(group=self._group)}
        if name not in found:
            known = [*self._objects, *found]
            raise ConfigError(
                f"{self._key} is {name!r}, but must be one of {', '.join(known)}.{did_you_mean(name, known)}",
                key=self._key,
            )
        package = found[name].module.partition(".")[0]
        if package not in trust:
            raise TrustError(
                f"{self._key}={name} runs code of the package {package}. If you trust it, add trust=[{package}] on the "
                "command line."
            )
        try:
            one: Any = found[name].load()
        except Exception as error:
            raise ConfigError(
                f"{self._key}={name} cannot be imported from {found[name].value}: {type(error).__name__}: {error}. "
                f"Repair the installation of {package}, or choose another {self._key}.",
                key=self._key,
            ) from error
        return self._objects.setdefault(name, one)
