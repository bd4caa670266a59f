"""The clusters of this user, for `launch up`, `status` and `down`: those elsewhere, and the Ray that is kept here."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launcher.clusters import base
from launcher.clusters.remote import registry
from launcher.clusters.remote.registry import Head
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError, LaunchError
from launcher.formatting import count

Tell = Callable[[str], None]


def up(cluster: ClusterConfig, tell: Tell) -> Head:
    """Make the cluster that a configuration names, or see that it is there.

    Raises:
        ConfigError: its kind is none that is made.
        LaunchError: it did not come; see the kind's own `up`.
    """
    kind = base.kind_of(cluster)
    if not kind.provisions:
        kinds = [each.name for each in base.kinds() if each.provisions]
        raise ConfigError(
            f"launch up makes a cluster on other machines, and cluster={cluster.kind} has none to make. Choose "
            f"{' or '.join(f'cluster={name}' for name in kinds)}, such as launch up cluster=ssh "
            "cluster.hosts=[vm1,vm2]."
        )
    return kind.provision(cluster, tell)


def status(name: str | None = None) -> list[dict[str, Any]]:
    """Return the clusters of this user as they are now, or one of them, one mapping each; secrets left out.

    Raises:
        ClusterError: none has this name.
    """
    kept = [session.facts() for name_of, session in _sessions().items() if name in (None, name_of)]
    if name is not None:
        return kept or [_asked(registry.load(name))]
    found = registry.all_heads()
    if not found:
        return kept
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [*kept, *pool.map(_asked, found)]


def told(clusters: list[dict[str, Any]]) -> str:
    """Return `status` for people."""
    if not clusters:
        return "There is no cluster: `launch up` makes one, and no Ray waits here (cluster.keep_minutes keeps one)."
    sessions = _sessions()
    return "\n".join(sessions[one["name"]].text() if one["name"] in sessions else _told(one) for one in clusters)


def down(name: str | None, tell: Tell, before: Callable[[Head], None], forget: bool = False) -> None:
    """End a cluster with whatever runs on it; without a name the only one there is.

    Args:
        before: called with one elsewhere before it is ended, and may raise to keep it.
        forget: of one elsewhere, only what is written down here; its machines are left as they are.

    Raises:
        ConfigError: there are several, and none is named.
        ClusterError: none has this name.
        MachineError: something of it is left.
    """
    sessions = _sessions()
    names = [*sessions] + [head.name for head in registry.all_heads()]
    if name is None and len(names) > 1:
        raise ConfigError(f"There are {count(len(names), 'cluster')}: {', '.join(names)}. Say which: launch down NAME.")
    chosen = name or (names[0] if names else None)
    if chosen is None:
        tell("Nothing is kept, so there is nothing to end.")
    elif chosen in sessions:
        sessions[chosen].end(tell)
    elif forget:
        registry.load(chosen)
        registry.forget(chosen)
        tell(f"The cluster {chosen} is forgotten here. What runs on its machines was left as it is.")
    else:
        head = registry.load(chosen)
        before(head)
        base.named(head.kind).remove(chosen, tell)


def _sessions() -> dict[str, base.Session]:
    """Return what kinds keep running on this machine between commands, by name."""
    found = {kind.name: kind.session() for kind in base.kinds()}
    return {name: session for name, session in found.items() if session is not None}


def _asked(head: Head) -> dict[str, Any]:
    try:
        head, said = base.named(head.kind).status(head)
    except LaunchError as error:
        said = [str(error)]
    public = ("name", "address", "state", "why", "cpus", "gpus", "size")
    return {
        "name": head.name,
        "kind": head.kind,
        "state": "up" if head.hosts and head.hosts[0].get("state") in ("lives", "running") else "down",
        "address": head.address,
        "dashboard": head.dashboard,
        "directory": head.directory,
        "created": head.created,
        "usd_per_hour": head.usd_per_hour,
        "ssh": shlex.join(head.ssh),
        "hosts": [{key: host[key] for key in public if host.get(key) is not None} for host in head.hosts],
        "notes": said,
    }


def _told(one: dict[str, Any]) -> str:
    cost = f"{one['usd_per_hour']:.2f} USD/h" if one["usd_per_hour"] is not None else "cost unknown"
    lines = [f"{one['name']}  {one['kind']}  {one['state']}  {one['address']}  {cost}  {one['ssh']}"]
    width = max((len(host["name"]) for host in one["hosts"]), default=0)
    for host in one["hosts"]:
        has = [count(host[key], word) for key, word in (("cpus", "CPU"), ("gpus", "GPU")) if host.get(key)]
        facts = "  ".join(part for part in (host.get("address", ""), ", ".join(has)) if part)
        lines.append(f"  {host['name']:<{width}}  {host['state']:<7}  {facts}".rstrip())
    return "\n".join([*lines, *(f"  ! {note}" for note in one["notes"])])
