"""The nodes of a cluster join its head: how many are waited for, what the head says of them, and what they cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.clusters.azure import failures, ray_yaml
from launcher.clusters.azure.api import Api, translated_errors
from launcher.clusters.azure.head_creation import NoCapacity
from launcher.clusters.azure.spec import DIRECTORY, ClusterSpec
from launcher.clusters.pricing import catalogue
from launcher.clusters.pricing.catalogue import Vm
from launcher.clusters.remote.registry import Head, save
from launcher.errors import MachineError
from launcher.formatting import count

NODES_SECONDS = 1800.0
POLL_SECONDS = 2.0
ASK_SECONDS = 600.0  # the watchdog may be deleting VMs
Tell = Callable[[str], None]


def wait(api: Api, wish: ClusterSpec, head: Head, tell: Tell) -> Head:
    """Wait until the nodes have joined that were asked for, and return the head with all that are there."""
    _ask(head, wish.min_nodes)
    begun = time.monotonic()
    seen = -1
    while True:
        found = report(head)
        nodes = [node for node in found["nodes"] if node["gpus"]]
        if len(nodes) != seen:
            seen = len(nodes)
            tell(f"{seen} of {count(wish.min_nodes, 'node')} are there.")
        if found["nodes"] and seen >= wish.min_nodes:
            break
        try:
            _give_up(wish, found, seen, time.monotonic() - begun)
        except MachineError as error:
            if seen < wish.enough:
                raise
            tell(f"{error} It goes on with {count(seen, 'node')}.")
            _ask(head, seen)
            break
        time.sleep(POLL_SECONDS)
    with translated_errors(f"Asking what the machines of {wish.name} cost"):
        machines = api.machines(wish.group)
    fresh = {vm.name: vm for vm in (wish.nodes.size, wish.nodes.head)}
    usd = usd_per_hour(machines, wish.nodes.region, {**catalogue.sizes(), **catalogue.heads(), **fresh})
    own = next((node["address"] for node in found["nodes"] if not node["gpus"]), "127.0.0.1")
    others = [{"name": node["host"], "address": node["address"], "state": "running"} for node in nodes]
    head = replace(head, address=f"{own}:{ray_yaml.PORT}", usd_per_hour=usd, hosts=[head.hosts[0], *others])
    save(head)
    return head


def wish_of(nodes: int) -> str:
    """Return the shell line for the head by which so many nodes are wished for."""
    return f"flock {DIRECTORY}/wish.lock sh -c 'echo {nodes} > {DIRECTORY}/wish'"


def _ask(head: Head, nodes: int) -> None:
    """Have the head's watchdog ask for so many nodes. It holds the lock while it deletes some: ours come after that."""
    head.shell().run(wish_of(nodes), seconds=ASK_SECONDS, what="asking for nodes")


def _give_up(wish: ClusterSpec, found: dict[str, Any], seen: int, seconds: float) -> None:
    """Raise where nodes were refused as often as they may be (on spot and on demand where both are wanted), or late."""
    spot, plain = failures.SPOT, failures.ON_DEMAND
    kinds = {True: [spot], False: [plain], "prefer": [spot, plain]}[wish.nodes.spot]
    failed = [failures.LaunchFailure(**one) for one in found["failures"]]
    if all(sum(1 for one in failed if one.kind == kind) >= wish.launch_attempts for kind in kinds):
        last = failed[-1]
        error = NoCapacity if last.code in failures.CAPACITY else MachineError
        raise error(
            f"Azure did not create the nodes of {wish.name} ({wish.place}) in "
            f"{count(wish.launch_attempts, 'attempt')}. {last.words}"
        )
    if seconds > NODES_SECONDS:
        raise MachineError(
            f"{seen} of {count(wish.min_nodes, 'node')} of {wish.name} came within {NODES_SECONDS / 60:g} minutes. "
            f"{complaint(found)}"
        )


def complaint(found: dict[str, Any]) -> str:
    words = [failures.LaunchFailure(**one).words for one in found["failures"][-1:]]
    if found["monitor_err"]:
        words.append(f"Ray's autoscaler says: {found['monitor_err'][-600:]}")
    return " ".join(words)


def report(head: Head) -> dict[str, Any]:
    """Return what the head says of its cluster; see `on_head.report`.

    Raises:
        HostError: it does not answer.
    """
    command = f"RAY_AUTH_MODE=token PYTHONPATH={ray_yaml.CODE} {head.python} -m launcher.clusters.azure.on_head report"
    found: dict[str, Any] = json.loads(head.shell().run(command, seconds=60, what="asking the head for its nodes"))
    return found


def usd_per_hour(machines: Sequence[Mapping[str, Any]], region: str, vms: Mapping[str, Vm]) -> float | None:
    """Return what machines that run cost an hour, each as it came: as spot or on demand. None: a price is not known.

    Args:
        machines: see `Api.machines`.
        vms: with prices, by name.
    """
    total = 0.0
    for machine in machines:
        if machine["state"] == "deallocated":
            continue
        known = vms.get(machine["size"])
        price = known.price(region, machine["spot"]) if known else None
        if price is None:
            return None
        total += price.usd_per_hour
    return round(total, 4)
