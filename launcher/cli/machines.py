"""The clusters of this user, for `launch up`, `status` and `down`: those elsewhere, and the Ray that is kept here."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launcher.clusters.azure import lifecycle as azure
from launcher.clusters.local import ray_session
from launcher.clusters.remote import registry
from launcher.clusters.remote.registry import Head
from launcher.clusters.ssh import lifecycle as ssh
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError, LaunchError, MachineError
from launcher.formatting import count, duration

Tell = Callable[[str], None]
LOCAL = "local"
# How each kind of cluster comes, is looked at, and goes.
_UP: dict[str, Callable[[ClusterConfig, Tell], Head]] = {"ssh": ssh.up, "azure": azure.up}
_STATUS: dict[str, Callable[[Head], tuple[Head, list[str]]]] = {"ssh": ssh.status, "azure": azure.status}
_DOWN: dict[str, Callable[[str, Tell], None]] = {"ssh": ssh.down, "azure": azure.down}


def up(cluster: ClusterConfig, tell: Tell) -> Head:
    """Make the cluster that a configuration names, or see that it is there.

    Raises:
        ConfigError: its kind is none that is made.
        LaunchError: it did not come; see the kind's own `up`.
    """
    if cluster.kind not in _UP:
        raise ConfigError(
            f"launch up makes a cluster on other machines, and cluster={cluster.kind} has none to make. Choose "
            f"{' or '.join(f'cluster={kind}' for kind in _UP)}, such as launch up cluster=ssh cluster.hosts=[vm1,vm2]."
        )
    return _UP[cluster.kind](cluster, tell)


def status(name: str | None = None) -> list[dict[str, Any]]:
    """Return the clusters of this user as they are now, or one of them, one mapping each; secrets left out.

    Raises:
        ClusterError: none has this name.
    """
    kept = _kept()
    if name is not None and (name != LOCAL or not kept):
        return [_asked(registry.load(name))]
    if name is not None:
        return kept
    found = registry.all_heads()
    if not found:
        return kept
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [*kept, *pool.map(_asked, found)]


def told(clusters: list[dict[str, Any]]) -> str:
    """Return `status` for people."""
    if not clusters:
        return "There is no cluster: `launch up` makes one, and no Ray waits here (cluster.keep_minutes keeps one)."
    return "\n".join(_kept_told(one) if one["kind"] == LOCAL else _told(one) for one in clusters)


def down(name: str | None, tell: Tell, forget: bool = False) -> None:
    """End a cluster with whatever runs on it; without a name the only one there is.

    Args:
        forget: of one elsewhere, only what is written down here; its machines are left as they are.

    Raises:
        ConfigError: there are several, and none is named.
        ClusterError: none has this name.
        MachineError: something of it is left.
    """
    kept = ray_session.current()
    names = ([LOCAL] if kept is not None else []) + [head.name for head in registry.all_heads()]
    if name is None and len(names) > 1:
        raise ConfigError(f"There are {count(len(names), 'cluster')}: {', '.join(names)}. Say which: launch down NAME.")
    chosen = name or (names[0] if names else None)
    if chosen is None:
        tell("Nothing is kept, so there is nothing to end.")
    elif chosen == LOCAL and kept is not None:
        if not ray_session.end(kept):
            raise MachineError(
                f"Some processes with {kept.marker} in their environment could not be ended within 30 s."
            )
        tell("The Ray that was kept on this machine has ended.")
    elif forget:
        registry.load(chosen)
        registry.forget(chosen)
        tell(f"The cluster {chosen} is forgotten here. What runs on its machines was left as it is.")
    else:
        _DOWN[registry.load(chosen).kind](chosen, tell)


def _kept() -> list[dict[str, Any]]:
    kept = ray_session.current()
    if kept is None:
        return []
    facts = {"name": LOCAL, "kind": LOCAL, "address": kept.address, "cpus": kept.cpus, "gpus": kept.gpus}
    return [
        {
            **facts,
            "state": "in use" if ray_session.in_use() else "idle",
            "seconds": round(time.time() - kept.since, 1),
            "keep_minutes": ray_session.idle_minutes(),
            "usd_per_hour": 0.0,
        }
    ]


def _kept_told(one: dict[str, Any]) -> str:
    return (
        f"{one['name']}  {one['state']}  {count(one['cpus'], 'CPU')}, {count(one['gpus'], 'GPU')}  up for "
        f"{duration(one['seconds'])}, ends after {count(one['keep_minutes'], 'idle minute')}  "
        f"{one['usd_per_hour']:.2f} USD/h  `launch down` ends it now"
    )


def _asked(head: Head) -> dict[str, Any]:
    try:
        head, said = _STATUS[head.kind](head)
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
