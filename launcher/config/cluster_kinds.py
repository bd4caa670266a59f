"""The registry of cluster kinds, and the attributes of a kind that the configuration uses.

A kind is an object. Each folder of `launcher/clusters` with a module `kind` has one, named `KIND` there; other packages
name theirs in the entry point group `launch.clusters`. They are found by folder and by entry point, so this module
imports none of them by name, and nothing outside a kind's folder compares names.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

GROUP = "launch.clusters"
PACKAGE = "launcher.clusters"
OBJECT = "KIND"


class KeysOfKind:
    """The attributes of a cluster kind that the configuration uses. `launcher.clusters.base.ClusterKind` adds methods.

    Attributes:
        name: the value of `cluster.kind`, and of the word `cluster=NAME`.
        config: a subclass of `ClusterConfig`, whose further fields are the kind's own keys.
        is_default: the kind of a configuration that names none.
        in_process: the job runs in the process of the command, or in ranks that another program started.
        attaches: its clusters run already and are reached by `cluster.address`; a driver on a head uses this kind.
        on_this_machine: code runs on the machine of the command, so any configuration file may choose the kind.
        is_rented: its machines may be paid by the hour.
        makes_mounts: `cluster.mounts` are made on its nodes.
        free_keys: own keys that a configuration file may set; all others only the user (`launcher.config.authority`).
        exclusive_keys: own keys that are an error with another kind; all others are ignored there.
        counts_own_nodes: `cluster.nodes` counts nodes that exist already, so it needs no `cluster.size`.
        key_help: own key -> its sentence in `launch help`.
    """

    name: str
    config: type[Any]
    is_default = False
    in_process = False
    attaches = False
    on_this_machine = False
    is_rented = False
    makes_mounts = False
    free_keys: tuple[str, ...] = ()
    exclusive_keys: tuple[str, ...] = ()
    counts_own_nodes = False
    key_help: Mapping[str, str] = MappingProxyType({})

    def check(self, cluster: Any) -> None:
        """Check the values of the kind's own keys. Raises ConfigError with key, value and rule."""


@cache
def all_kinds() -> dict[str, Any]:
    """Return every registered kind by its name: ours, then those of other packages."""
    found: dict[str, Any] = {}
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    for folder in pkgutil.iter_modules(spec.submodule_search_locations):
        if folder.ispkg and importlib.util.find_spec(f"{PACKAGE}.{folder.name}.kind") is not None:
            kind = getattr(importlib.import_module(f"{PACKAGE}.{folder.name}.kind"), OBJECT)
            found[kind.name] = kind
    from importlib.metadata import entry_points  # slow to import, and not needed for tab completion

    for entry in entry_points(group=GROUP):
        kind = entry.load()
        found.setdefault(kind.name, kind)
    return found


def find(name: str) -> Any | None:
    """Return the kind of this name; None where none is registered."""
    return all_kinds().get(name)


def one_with(attribute: str) -> Any:
    """Return the kind for which the attribute is true; ours where several have it."""
    return next(kind for kind in all_kinds().values() if getattr(kind, attribute))


def may_be_chosen_by_a_file(name: Any) -> bool:
    """Return whether a configuration file may choose the kind; see `launcher.config.authority`."""
    kind = find(name) if isinstance(name, str) else None
    return kind is not None and kind.on_this_machine
