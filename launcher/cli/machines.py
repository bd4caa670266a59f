"""Creates, lists and stops the clusters of this user: those on other machines, and Ray sessions on this one."""

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


def up(cluster: ClusterConfig, note: Callable[[str], None]) -> Head:
    """Create the cluster that a configuration describes. Idempotent: a cluster that is running is left unchanged.

    Args:
        note: receives lines about the progress.

    Raises:
        ConfigError: clusters of this kind are not created by launch.
        LaunchError: the cluster could not be created; see the kind's own `provision`.
    """
    kind = base.kind_of(cluster)
    if not kind.provisions:
        kinds = [each.name for each in base.kinds() if each.provisions]
        raise ConfigError(
            f"launch up creates clusters on other machines, which cluster={cluster.kind} does not use. Choose "
            f"{' or '.join(f'cluster={name}' for name in kinds)}, such as launch up cluster=ssh "
            "cluster.hosts=[vm1,vm2]."
        )
    return kind.provision(cluster, note)


def status(name: str | None = None) -> list[dict[str, Any]]:
    """Return the present state of the clusters of this user, or of one of them: one mapping each, without secrets.

    Raises:
        ClusterError: no cluster has this name.
    """
    sessions = [session.facts() for name_of, session in _sessions().items() if name in (None, name_of)]
    if name is not None:
        return sessions or [_inspect(registry.load(name))]
    heads = registry.all_heads()
    if not heads:
        return sessions
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [*sessions, *pool.map(_inspect, heads)]


def table(clusters: list[dict[str, Any]]) -> str:
    """Return the result of `status` as text."""
    if not clusters:
        return (
            "There is no cluster. `launch up` creates one; cluster.keep_minutes=10 keeps Ray running on this machine."
        )
    sessions = _sessions()
    return "\n".join(sessions[one["name"]].text() if one["name"] in sessions else _lines(one) for one in clusters)


def down(name: str | None, note: Callable[[str], None], before: Callable[[Head], None], forget: bool = False) -> None:
    """Stop a cluster and everything that runs on it.

    Args:
        name: the cluster; None for the only one that exists.
        note: receives lines about the progress.
        before: called with the head of a remote cluster before it is stopped; raises an error to prevent that.
        forget: delete only the local record of a remote cluster, and leave its machines as they are.

    Raises:
        ConfigError: there are several clusters, and no name is given.
        ClusterError: no cluster has this name.
        MachineError: a part of the cluster could not be removed.
    """
    sessions = _sessions()
    names = [*sessions, *(head.name for head in registry.all_heads())]
    if name is None and len(names) > 1:
        raise ConfigError(f"There are {count(len(names), 'cluster')}: {', '.join(names)}. Name one: launch down NAME.")
    chosen = name or (names[0] if names else None)
    if chosen is None:
        note("There is no cluster to stop.")
    elif chosen in sessions:
        sessions[chosen].end(note)
    elif forget:
        registry.load(chosen)
        registry.forget(chosen)
        note(f"The local record of the cluster {chosen} is deleted. Its machines were left as they are.")
    else:
        head = registry.load(chosen)
        before(head)
        base.named(head.kind).remove(chosen, note)


def _sessions() -> dict[str, base.Session]:
    """Return the Ray sessions that keep running on this machine between commands, by the name of their kind."""
    found = {kind.name: kind.session() for kind in base.kinds()}
    return {name: session for name, session in found.items() if session is not None}


def _inspect(head: Head) -> dict[str, Any]:
    try:
        head, notes = base.named(head.kind).status(head)
    except LaunchError as error:
        notes = [str(error)]
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
        "notes": notes,
    }


def _lines(one: dict[str, Any]) -> str:
    cost = f"{one['usd_per_hour']:.2f} USD/h" if one["usd_per_hour"] is not None else "cost unknown"
    lines = [f"{one['name']}  {one['kind']}  {one['state']}  {one['address']}  {cost}  {one['ssh']}"]
    width = max((len(host["name"]) for host in one["hosts"]), default=0)
    for host in one["hosts"]:
        has = [count(host[key], word) for key, word in (("cpus", "CPU"), ("gpus", "GPU")) if host.get(key)]
        facts = "  ".join(part for part in (host.get("address", ""), ", ".join(has)) if part)
        lines.append(f"  {host['name']:<{width}}  {host['state']:<7}  {facts}".rstrip())
    return "\n".join([*lines, *(f"  ! {note}" for note in one["notes"])])
