"""Conditions of swept keys: which options of a swept group have a key, by their files and the signatures of classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.config import Job, targets
from launcher.engine.strategies.kinds.base import accepted_options
from launcher.errors import ConfigError
from launcher.sweeps.space import ChoiceAxis, Condition, SearchSpace

_SECTIONS = ("model", "data", "optimizer", "scheduler")
_OVERLAYS = "experiment"  # the group whose options set keys of all sections


def without_candidates(space: SearchSpace, groups: Collection[str]) -> SearchSpace:
    """Return the search space without the axes that might have a condition."""
    parents = _parents(space, groups)
    return replace(space, axes=tuple(axis for axis in space.axes if axis.key not in parents))


def find_conditions(
    space: SearchSpace, groups: Collection[str], compose: Callable[[Sequence[str]], Job]
) -> dict[str, Condition]:
    """Return the conditions of the axes that only some options of a swept group have, by key.

    An axis that no option has gets no condition, so that the check of the trials reports the unknown key.

    Args:
        groups: names of the configuration groups.
        compose: composes the words of a trial.

    Raises:
        ConfigError: an option cannot be composed.
    """
    parents = _parents(space, groups)
    found = {}
    for parent in {axis.key: axis for axis in parents.values()}.values():
        others = {key: value for key, value in space.first_values().items() if key not in parents}
        jobs = {option: compose(space.trial({**others, parent.key: option})) for option in parent.values}
        for key in (key for key, axis in parents.items() if axis is parent):
            options = tuple(option for option, job in jobs.items() if _has(job, key))
            if 0 < len(options) < len(jobs):
                found[key] = Condition(parent.key, options)
    return found


def check_signatures(job: Job) -> None:
    """Check the keys of a job against the signatures of its classes.

    Raises:
        ConfigError: a class does not accept a key, or requires one that is missing.
        TrustError: a class belongs to a package that `trust` does not name.
    """
    for kind in _SECTIONS:
        section = getattr(job, kind)
        if section.get("_target_"):
            targets.check_signature(section, kind, job.trust)
    for name, section in job.callbacks.items():
        if section is not None:
            targets.check_signature(section, "callback", job.trust, at=f"callbacks.{name}")


def _parents(space: SearchSpace, groups: Collection[str]) -> dict[str, ChoiceAxis]:
    """Return the swept group that determines whether an axis exists, by key: that of its section, or experiments."""
    swept_groups = {
        axis.key: axis
        for axis in space.axes
        if isinstance(axis, ChoiceAxis) and axis.key in groups and len(axis.values) > 1
    }
    found = {}
    for axis in space.axes:
        section, _, path = axis.key.partition(".")
        parent = swept_groups.get(section, swept_groups.get(_OVERLAYS))
        if path and parent is not None and section in (*_SECTIONS, "strategy", "callbacks"):
            found[axis.key] = parent
    return found


def _has(job: Job, key: str) -> bool:
    section, _, path = key.partition(".")
    if section == "strategy":
        return path in accepted_options(job.strategy, job.trust)
    if section == "callbacks":
        name, _, path = path.partition(".")
        return not path or (
            job.callbacks.get(name) is not None and _accepts(job.callbacks[name], "callback", path, job)
        )
    return section not in _SECTIONS or _accepts(getattr(job, section), section, path, job)


def _accepts(section: Mapping[str, Any], kind: str, path: str, job: Job) -> bool:
    """Return whether a section has a key, or its class accepts it."""
    name = path.partition(".")[0]
    if name in section or name in targets.RESERVED.get(kind, ()):
        return True
    if "_target_" not in section:
        return False
    try:
        return targets.accepts(section, kind, name, job.trust)
    except ConfigError:  # the class cannot be imported on this machine; the machine that trains may have it
        return True
