"""The records of this user's remote clusters: the address of each head, and the ssh command to it.

Each cluster has a private JSON file in $XDG_STATE_HOME/launch/clusters (default: ~/.local/state/launch/clusters). It
contains no secret: the cluster's token is stored on its nodes, and read over SSH when it is needed.
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
    """The record of a remote cluster.

    Attributes:
        name: the name of the cluster.
        kind: "ssh" or "azure".
        ssh: the ssh command to the head, including the destination.
        python: the interpreter on the head.
        address: HOST:PORT of Ray's GCS in the network of the nodes.
        dashboard: the port of the dashboard on the head's loopback interface.
        directory: absolute path on the head of launch's directory, with copies of projects, and runs.
        usd_per_hour: price of all machines; None if it is unknown.
        created: ISO time.
        hosts: one mapping per host: name, address, state, and other keys of the cluster's kind.
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

    def missing_hosts(self) -> list[str]:
        """Return the names of the hosts that could not be used when they were last contacted."""
        return [host["name"] for host in self.hosts if host.get("state") == "dead" and not host.get("leaving")]


def directory() -> Path:
    """Return the directory of the records."""
    return user_state.directory() / "clusters"


def save(head: Head) -> None:
    """Write the record of a cluster, replacing an earlier one.

    Raises:
        ClusterError: the name is invalid, or the directory cannot be written.
    """
    path = _path(head.name)
    try:
        user_state.write_private(path, json.dumps(asdict(head), indent=2) + "\n")
    except OSError as error:
        raise ClusterError(
            f"The record of the cluster {head.name} cannot be written to {path.parent} ({error.strerror}), so "
            "`launch status` and `launch down` would not find the cluster. Make the directory writable, or set "
            "XDG_STATE_HOME."
        ) from None


def load(name: str) -> Head:
    """Return the record of a cluster.

    Raises:
        ClusterError: there is no cluster with this name; the message has the most similar name.
    """
    found = _read(_path(name))
    if found is None:
        names = [head.name for head in all_heads()]
        known = f"Your clusters: {', '.join(names)}." if names else "You have no clusters. `launch up` creates one."
        raise ClusterError(f'There is no cluster "{name}".{did_you_mean(name, names)} {known}')
    return found


def all_heads() -> list[Head]:
    """Return the records of all clusters of this user, sorted by name."""
    found = [_read(path) for path in sorted(directory().glob("*.json"))]
    return [head for head in found if head is not None]


def forget(name: str) -> None:
    """Remove the record of a cluster, if there is one."""
    _path(name).unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raise ClusterError unless `name` is a valid name of a cluster."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ClusterError(
            f'"{name}" is not a valid name of a cluster. Use at most 63 letters, digits, ".", "_" and "-", beginning '
            "with a letter or digit."
        )


def _path(name: str) -> Path:
    check_name(name)
    return directory() / f"{name}.json"


def _read(path: Path) -> Head | None:
    try:
        known = {each.name for each in fields(Head)}
        return Head(**{key: value for key, value in json.loads(path.read_text()).items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not a record
        return None
