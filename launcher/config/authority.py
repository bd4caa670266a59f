"""Keys that a configuration file may not set: where code runs, and where secrets are sent.

The keys of this rule count only where the user chose them: in words of the command line, in the option file that a word
`cluster=NAME` selects, and in the user's own settings (`launcher.config.settings`). To enforce it, `compose` composes
these sources alone a second time, and compares: a value that the complete configuration has and this trusted one has
not was set by another file, by any mechanism (packages, defaults lists, interpolation). No file is searched for
forbidden keys, so a file cannot hide them.

Plain Python: no Hydra.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from launcher.config import masking
from launcher.config.cluster_kinds import all_kinds, may_be_chosen_by_a_file
from launcher.config.schema import cluster_schema, own_keys

_COMMON = ("setup", "env", "mounts")


@cache
def guarded() -> tuple[str, ...]:
    """Return the keys of the section `cluster` that a file may not set, `kind` apart."""
    own = [key for kind in all_kinds().values() for key in own_keys(kind) if key not in kind.free_keys]
    return tuple(dict.fromkeys([*own, *_COMMON]))


@cache
def _defaults() -> dict[str, Any]:
    return dataclasses.asdict(cluster_schema()())


_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@dataclasses.dataclass(frozen=True)
class ComposedFile:
    """A composed file: its path without `.yaml`, its package, its plain content, the options it chooses."""

    name: str
    package: Sequence[str]
    content: Any
    options: frozenset[str]


def claims(cluster: Any, root: Any) -> dict[str, Any]:
    """Return the values of a section `cluster` and of `run.root` that need the user's authority, by dotted key."""
    found = {}
    if isinstance(cluster, Mapping):
        if "kind" in cluster and not may_be_chosen_by_a_file(cluster["kind"]):
            found["cluster.kind"] = cluster["kind"]
        for key in guarded():
            if key in cluster and cluster[key] != _defaults()[key]:
                found[f"cluster.{key}"] = cluster[key]
    elif cluster is not None:
        found["cluster"] = cluster
    if isinstance(root, str) and "://" in root:
        found["run.root"] = root
    return found


def without_claims(content: Mapping[str, Any], decided: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove the keys from a run's stored configuration that it may not set.

    A section `cluster` of another kind than local or none describes that cluster, and is removed as a whole.

    Args:
        decided: the section `cluster` that the user's own record has for the run; it replaces the stored one.

    Returns:
        The content, and the keys that were removed without a replacement, with their values.
    """
    kept = {key: value for key, value in content.items() if key != "trust"}
    run, cluster = kept.get("run"), kept.get("cluster")
    root = run.get("root") if isinstance(run, Mapping) else run
    dropped = claims({} if decided else cluster, root)
    if content.get("trust"):
        dropped["trust"] = content["trust"]
    if isinstance(run, Mapping):
        kept["run"] = {key: value for key, value in run.items() if key != "root" or not _may_leave(value)}
    elif run is not None:
        kept.pop("run")
    if decided:
        kept["cluster"] = dict(decided)
    elif not isinstance(cluster, Mapping) or "cluster.kind" in dropped:
        kept.pop("cluster", None)
    else:
        kept["cluster"] = {key: value for key, value in cluster.items() if key not in guarded()}
    return kept, dropped


def _may_leave(root: Any) -> bool:
    """Return whether a stored run root may be on another machine, or depends on the environment."""
    return not isinstance(root, str) or "://" in root or "${" in root


def is_guarded_word(key: str, value: Any) -> bool:
    """Return whether a word for `key` needs the user's authority; in a recorded sweep it is dropped."""
    section, _, name = key.partition(".")
    if section == "cluster" and not name:
        return not may_be_chosen_by_a_file(value)
    if section == "cluster":
        return name.partition(".")[0] in guarded() or (name == "kind" and not may_be_chosen_by_a_file(value))
    return key == "trust" or key.startswith("cluster/")


def word_for(key: str, value: Any) -> str:
    """Return the word that sets a key on the command line, quoted for the shell."""
    name = "cluster" if key == "cluster.kind" else key
    if _REFERENCE.search(str(value)):  # it may refer to a key that a file sets
        return f"{name}=..."
    return shlex.quote(f"{name}={_text(masking.mask(value, key.rpartition('.')[2]))}")


def words_for(found: Mapping[str, Any]) -> str:
    return " ".join(word_for(key, value) for key, value in found.items())


def refusal(
    found: Mapping[str, Any],
    files: Sequence[ComposedFile],
    primary: str,
    directory: str,
    settings: str,
) -> str:
    """Return the error for keys that files have set without authority.

    Args:
        found: the keys with their values as they were written.
        files: the composed files, in order.
        primary: the name of the primary configuration among them.
        directory: the directory of the files, or the file of a run's own configuration.
        settings: the file of the user's own settings.
    """
    places: dict[str, list[str]] = {}
    for key, value in found.items():
        name = _file_that_decides(key, value, files)
        if name is None:
            place = "a configuration file"
        elif name == primary:
            place = directory if directory.endswith(".yaml") else f"{directory}/config.yaml"
        else:
            place = f"{directory}/{name}.yaml"
        places.setdefault(place, []).append(key)
    facts = "; ".join(f"{place} decides {', '.join(names)}" for place, names in places.items())
    return (
        f"{facts[0].upper()}{facts[1:]}, but a configuration file does not choose where code runs or where secrets go, "
        f"and puts nothing of the environment into the section run. If you want this, add it to the command line: "
        f"{words_for(found)}; or keep it in {settings}."
    )


def _file_that_decides(key: str, value: Any, files: Sequence[ComposedFile]) -> str | None:
    """Return the name of the file that sets a key, or that sets a value to which the key refers."""
    for wanted in (*_REFERENCE.findall(str(value)), key):
        names = [one.name for one in files if _sets(one.content, wanted.split("."), [*one.package])]
        if names:
            choosing = [one.name for one in files if names[-1] in one.options]
            return choosing[-1] if choosing and names[-1].startswith("cluster/") else names[-1]
    return None


def _sets(content: Any, path: list[str], package: list[str]) -> bool:
    """Return whether plain content under a package sets the key at `path`, or a whole section that contains it."""
    while package and path and package[0] == path[0]:
        package, path = package[1:], path[1:]
    if package:
        return False
    for part in path:
        if isinstance(content, str):  # the section is a reference
            return True
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(_text(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_./:@%${}-]+", text) else json.dumps(text)
