"""The clusters elsewhere that this user has: where their heads are, and how to get there.

One JSON file a cluster, for this user alone, in $XDG_STATE_HOME/launch/clusters (~/.local/state). No secret is in them:
a cluster's token lies on its nodes and is read over SSH when it is needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.clusters.remote.shell import Shell
from launcher.errors import ClusterError, did_you_mean
from launcher.runs import user_state


@dataclass(frozen=True)
class Head:
    """A cluster elsewhere, known by its head.

    Attributes:
        name: of the cluster.
        kind: "ssh" or "azure".
        ssh: the ssh command to the head, up to and with the destination.
        python: the interpreter on the head.
        address: HOST:PORT of Ray's GCS as its nodes see it.
        dashboard: its port on the head's loopback.
        directory: absolute, on the head: where launch keeps copies of projects, and runs.
        usd_per_hour: of all machines; None where nobody knows.
        created: ISO time.
        hosts: one mapping a host: name, address, state, and what its kind needs beside.
    """

    name: str
    kind: str
    ssh: list[str]
    python: str
    address: str
    dashboard: int
    directory: str
    usd_per_hour: float | None = None
    created: str = ""
    hosts: list[dict[str, Any]] = field(default_factory=list)

    def shell(self) -> Shell:
        return Shell(self.ssh)


def directory() -> Path:
    """Return where the clusters are written down."""
    return user_state.directory() / "clusters"


def save(head: Head) -> None:
    """Write a cluster down, in place of what was known of it.

    Raises:
        ClusterError: its name cannot be a file's, or the directory cannot be written.
    """
    path = _path(head.name)
    try:
        user_state.write_private(path, json.dumps(asdict(head), indent=2) + "\n")
    except OSError as error:
        raise ClusterError(
            f"The cluster {head.name} could not be written down in {path.parent} ({error.strerror}), and without that "
            "`launch status` and `launch down` would not find it. Make the directory writable, or set XDG_STATE_HOME."
        ) from None


def load(name: str) -> Head:
    """Return a cluster by its name.

    Raises:
        ClusterError: there is none of this name; names the nearest.
    """
    found = _read(_path(name))
    if found is None:
        names = [head.name for head in all_heads()]
        known = f"There are {', '.join(names)}." if names else "None is known here; `launch up` makes one."
        raise ClusterError(f'There is no cluster "{name}".{did_you_mean(name, names)} {known}')
    return found


def all_heads() -> list[Head]:
    """Return all clusters of this user, by name."""
    found = [_read(path) for path in sorted(directory().glob("*.json"))]
    return [head for head in found if head is not None]


def forget(name: str) -> None:
    """Remove what is written of a cluster; nothing happens where there is none."""
    _path(name).unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raise ClusterError unless `name` can be that of a cluster."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ClusterError(
            f'"{name}" cannot be the name of a cluster: letters, digits, ".", "_" and "-", beginning with a letter or '
            "digit, 63 at most."
        )


def _path(name: str) -> Path:
    check_name(name)
    return directory() / f"{name}.json"


def _read(path: Path) -> Head | None:
    try:
        known = {each.name for each in fields(Head)}
        return Head(**{key: value for key, value in json.loads(path.read_text()).items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or not one of ours
        return None
