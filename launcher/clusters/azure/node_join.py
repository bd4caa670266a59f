"""Wait until the nodes of a cluster have joined its head, with progress and errors from the head, and their cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.clusters.azure import failures, ray_yaml
from launcher.clusters.azure.api import Api, translated_errors
from launcher.clusters.azure.head_creation import NoCapacity
from launcher.clusters.azure.spec import DIRECTORY, ClusterSpec
from launcher.clusters.base import Report
from launcher.clusters.pricing import catalogue
from launcher.clusters.pricing.catalogue import Vm
from launcher.clusters.remote.registry import Head, save
from launcher.errors import MachineError
from launcher.formatting import count

NODES_SECONDS = 1800.0
POLL_SECONDS = 2.0
REQUEST_SECONDS = 600.0  # the watchdog may be deleting VMs


def wait(api: Api, spec: ClusterSpec, head: Head, report: Report) -> Head:
    """Wait until `spec.min_nodes` nodes have joined, and return the record of the cluster with all its nodes.

    Raises:
        NoCapacity: Azure has no capacity for `spec.enough` nodes.
        MachineError: the nodes were not created for another reason, or not in time.
    """
    _request(head, spec.min_nodes)
    started = time.monotonic()
    joined = -1
    while True:
        found = head_report(head)
        nodes = [node for node in found["nodes"] if node["gpus"]]
        if len(nodes) != joined:
            joined = len(nodes)
            report(f"{joined} of {count(spec.min_nodes, 'node')} joined.")
        if found["nodes"] and joined >= spec.min_nodes:
            break
        try:
            _check_progress(spec, found, joined, time.monotonic() - started)
        except MachineError as error:
            if joined < spec.enough:
                raise
            report(f"{error} Continuing with {count(joined, 'node')}.")
            _request(head, joined)
            break
        time.sleep(POLL_SECONDS)
    with translated_errors(f"Listing the machines of {spec.name}"):
        machines = api.machines(spec.group)
    current = {vm.name: vm for vm in (spec.nodes.size, spec.nodes.head)}
    usd = usd_per_hour(machines, spec.nodes.region, {**catalogue.sizes(), **catalogue.heads(), **current})
    own = next((node["address"] for node in found["nodes"] if not node["gpus"]), "127.0.0.1")
    others = [{"name": node["host"], "address": node["address"], "state": "running"} for node in nodes]
    head = replace(head, address=f"{own}:{ray_yaml.PORT}", usd_per_hour=usd, hosts=[head.hosts[0], *others])
    save(head)
    return head


def request_line(nodes: int) -> str:
    """Return the shell line that requests this number of nodes from the watchdog on the head."""
    return f"flock {DIRECTORY}/requested.lock sh -c 'echo {nodes} > {DIRECTORY}/requested'"


def _request(head: Head, nodes: int) -> None:
    """Request nodes from the watchdog. It holds the lock while it deletes VMs, so the request waits for that."""
    head.shell().run(request_line(nodes), seconds=REQUEST_SECONDS, what="requesting nodes")


def _check_progress(spec: ClusterSpec, found: dict[str, Any], joined: int, seconds: float) -> None:
    """Raise an error if launches have failed `launch_attempts` times, or if the time limit has passed.

    With spot=prefer, both spot and on-demand launches must have failed this often.
    """
    spot, plain = failures.SPOT, failures.ON_DEMAND
    kinds = {True: [spot], False: [plain], "prefer": [spot, plain]}[spec.nodes.spot]
    failed = [failures.LaunchFailure(**one) for one in found["failures"]]
    if all(sum(1 for one in failed if one.kind == kind) >= spec.launch_attempts for kind in kinds):
        last = failed[-1]
        error = NoCapacity if last.code in failures.CAPACITY else MachineError
        raise error(
            f"Azure did not create the nodes of {spec.name} ({spec.place}) in "
            f"{count(spec.launch_attempts, 'attempt')}. {last}"
        )
    if seconds > NODES_SECONDS:
        raise MachineError(
            f"{joined} of {count(spec.min_nodes, 'node')} of {spec.name} joined within {NODES_SECONDS / 60:g} minutes. "
            f"{complaint(found)}"
        )


def complaint(found: dict[str, Any]) -> str:
    """Return the last failed launch and the errors of the autoscaler in a report of the head; may be empty."""
    parts = [str(failures.LaunchFailure(**one)) for one in found["failures"][-1:]]
    if found["monitor_err"]:
        parts.append(f"Ray's autoscaler reports: {found['monitor_err'][-600:]}")
    return " ".join(parts)


def head_report(head: Head) -> dict[str, Any]:
    """Return the head's report about its cluster; see `on_head.report`.

    Raises:
        HostError: the head does not answer.
    """
    command = f"RAY_AUTH_MODE=token PYTHONPATH={ray_yaml.CODE} {head.python} -m launcher.clusters.azure.on_head report"
    found: dict[str, Any] = json.loads(head.shell().run(command, seconds=60, what="querying the nodes of the head"))
    return found


def usd_per_hour(machines: Sequence[Mapping[str, Any]], region: str, vms: Mapping[str, Vm]) -> float | None:
    """Return the cost of running machines in US dollars per hour, each with its spot or on-demand price.

    Args:
        machines: see `Api.machines`.
        vms: the VM sizes with their prices, by name.

    Returns:
        The cost, or None if a price is unknown.
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
