"""Clusters of Azure VMs come up, are looked at, and go down as a whole.

head = up(job.cluster, tell)       # ~/.local/state/launch/clusters/NAME.json knows it from then on
head, told = status(head)
down(name, tell)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.clusters import heads
from launcher.clusters.azure import checks, failures, here, network, ray_yaml
from launcher.clusters.azure.api import Api, sign_in, told
from launcher.clusters.azure.wanted import DIRECTORY, PYTHON, USER, Wanted, check_name, group_of, wanted
from launcher.clusters.heads import Head
from launcher.errors import ClusterError, MachineError, ResourceError
from launcher.phrases import count
from launcher.schema import ClusterConfig

KIND = "azure"
NODES_SECONDS = 1800.0
POLL_SECONDS = 2.0
Tell = Callable[[str], None]
_NOTHING: dict[str, Any] = {
    "nodes": [],
    "why_none": "`launch up` has not come to its end.",
    "failures": [],
    "monitor_err": "",
}


class _NoCapacity(MachineError):
    """Azure has none of what was asked; the next alternative may be had."""


def up(cluster: ClusterConfig, tell: Tell) -> Head:
    """Return the cluster that is wanted; make it where it does not run.

    tell: is given a line for the user now and then.

    Raises:
        ConfigError, ResourceError, ClusterError: it cannot be made; nothing was created.
        MachineError: it was begun and failed; what was created is removed again.
    """
    alternatives = wanted(cluster)
    name = alternatives[0].name
    api = Api(sign_in(cluster.subscription))
    with told(f"Looking for the cluster {name}"):
        group = api.group(group_of(name))
    if group is not None:
        _own(group, name)
        running = [one for one in alternatives if one.nodes.region == group.location]
        if not running:
            raise ClusterError(
                f"The cluster {name} is there in {group.location}, and was asked for in "
                f"{alternatives[0].nodes.region}. Take another cluster.name, or remove it first: launch down {name}."
            )
        return _make(api, running[0], group, tell)
    refused: list[str] = []
    began = False
    for one in alternatives:
        try:
            checked = checks.check(api, one)
        except ResourceError as error:
            refused.append(str(error))
            continue
        began = True
        try:
            return _make(api, checked, None, tell)
        except _NoCapacity as error:
            refused.append(str(error))
    if began:
        raise MachineError(" ".join(refused))
    raise ResourceError(" ".join(refused))


def _make(api: Api, wish: Wanted, group: Any, tell: Tell) -> Head:
    """Create what is missing and wait for the nodes. What this call created it removes again where it fails."""
    wish = replace(wish, ssh_from=wish.ssh_from or f"{here.own_address()}/32")
    if group is not None:
        wish = replace(wish, zone=(group.tags or {}).get("launch-zone") or None)
        head = _running(wish.name)
        if head is not None:
            return _wait(wish, head, tell)
    try:
        head = _create(api, wish, tell)
        return _wait(wish, head, tell)
    except KeyboardInterrupt:
        tell(f"Interrupted. What was created costs money until it is removed: launch down {wish.name}")
        raise
    except Exception as error:
        if group is not None:
            raise
        tell(f"Removing what was created for {wish.name}.")
        try:
            _remove(api, wish.name)
        except Exception as second:
            raise MachineError(
                f"{error} Removing it failed as well ({second}): run `launch down {wish.name}`, or delete the resource "
                f"group {wish.group} by hand."
            ) from error
        raise


def _create(api: Api, wish: Wanted, tell: Tell) -> Head:
    tell(f"Creating {wish.name}: {count(wish.nodes.nodes, 'node')} at most, {wish.place}.")
    key = here.key_of(wish.name)
    heads.save(_head(wish, None, api.account.subscription))  # so that `down` finds what is begun
    with told(f"Creating the resource group {wish.group}"):
        tags = {**wish.tags, "launch-zone": wish.zone or ""}
        api.resources.resource_groups.create_or_update(wish.group, {"location": wish.nodes.region, "tags": tags})
    with told(f"Creating the network of {wish.name}"):
        api.deploy(wish.group, network.DEPLOYMENT, network.template(wish))
    local = ray_yaml.Local(
        subscription=api.account.subscription, key=str(key), files=here.files(wish.name), azure=here.pins()
    )
    file = here.file_of(wish.name, "yaml")
    file.write_text(ray_yaml.text(wish, local))
    _ray_up(wish, file, tell)
    with told(f"Asking for the address of {wish.name}"):
        address = api.public_address(wish.group)
    if address is None:
        raise MachineError(f"The head of {wish.name} has no public address.")
    head = _head(wish, address, api.account.subscription)
    heads.save(head)
    return head


def _head(wish: Wanted, address: str | None, subscription: str) -> Head:
    """Return the cluster as it is before its nodes; without an address it has begun to be made."""
    known = here.file_of(wish.name, "hosts")
    options = [
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        "StrictHostKeyChecking=accept-new",
        "-o",
        f"UserKnownHostsFile={known}",
    ]
    return Head(
        name=wish.name,
        kind=KIND,
        ssh=["ssh", "-i", str(here.file_of(wish.name, "key")), *options, f"{USER}@{address}"] if address else [],
        python=PYTHON,
        address=f"127.0.0.1:{ray_yaml.PORT}",
        dashboard=ray_yaml.DASHBOARD,
        directory=DIRECTORY,
        usd_per_hour=wish.nodes.head_usd_per_hour,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hosts=[
            {"name": "head", "address": address or "", "state": "running" if address else "creating"}
            | {"subscription": subscription}
        ],
    )


def _ray_up(wish: Wanted, file: Path, tell: Tell) -> None:
    """Run `ray up`, which makes the head. What it says goes to a file."""
    log, refused = here.file_of(wish.name, "log"), here.file_of(wish.name, "failures")
    refused.unlink(missing_ok=True)
    words = [sys.executable, "-m", "ray.scripts.scripts", "up", str(file), "--yes", "--no-config-cache"]
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        "RAY_UP_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        failures.VARIABLE: str(refused),
    }
    tell(f"Ray makes the head, a {wish.nodes.head.name}; its words go to {log}.")
    with log.open("wb") as sink:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode == 0:
        return
    for line in refused.read_text().splitlines() if refused.exists() else ():
        failure = failures.Failure(**json.loads(line))
        kind = _NoCapacity if failure.code in failures.CAPACITY else MachineError
        raise kind(f"Azure did not create the head of {wish.name} ({wish.place}). {failure.words}")
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise MachineError(f"`ray up` of {wish.name} failed: {' '.join(said[-4:])[-500:]} All of it is in {log}.")


def _wait(wish: Wanted, head: Head, tell: Tell) -> Head:
    """Wait until the nodes have joined that were asked for, and return the head with all that are there."""
    shell = head.shell()
    shell.run(f"echo {wish.min_nodes} > {DIRECTORY}/wish", seconds=60, what="asking for nodes")
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
        _check_failures(wish, found)
        if time.monotonic() - begun > NODES_SECONDS:
            raise MachineError(
                f"{seen} of {count(wish.min_nodes, 'node')} of {wish.name} came within {NODES_SECONDS / 60:g} minutes. "
                f"{_complaint(found)}"
            )
        time.sleep(POLL_SECONDS)
    usd = _usd(wish, len(nodes))
    own = next((node["address"] for node in found["nodes"] if not node["gpus"]), "127.0.0.1")
    others = [{"name": node["host"], "address": node["address"], "state": "running"} for node in nodes]
    head = replace(head, address=f"{own}:{ray_yaml.PORT}", usd_per_hour=usd, hosts=[head.hosts[0], *others])
    heads.save(head)
    return head


def _check_failures(wish: Wanted, found: dict[str, Any]) -> None:
    """Give up when nodes were refused as often as they may be, on spot and on demand where both are wanted."""
    spot, plain = failures.SPOT, failures.ON_DEMAND
    kinds = {True: [spot], False: [plain], "prefer": [spot, plain]}[wish.nodes.spot]
    failed = [failures.Failure(**one) for one in found["failures"]]
    if all(sum(1 for one in failed if one.kind == kind) >= wish.launch_attempts for kind in kinds):
        last = failed[-1]
        error = _NoCapacity if last.code in failures.CAPACITY else MachineError
        raise error(
            f"Azure did not create the nodes of {wish.name} ({wish.place}) in "
            f"{count(wish.launch_attempts, 'attempt')}. {last.words}"
        )


def _complaint(found: dict[str, Any]) -> str:
    told = [failures.Failure(**one).words for one in found["failures"][-1:]]
    if found["monitor_err"]:
        told.append(f"Ray's autoscaler says: {found['monitor_err'][-600:]}")
    return " ".join(told)


def report(head: Head) -> dict[str, Any]:
    """Return what the head says of its cluster; see `on_head.report`.

    Raises:
        HostError: it does not answer.
    """
    command = f"RAY_AUTH_MODE=token PYTHONPATH={ray_yaml.CODE} {head.python} -m launcher.clusters.azure.on_head report"
    found: dict[str, Any] = json.loads(head.shell().run(command, seconds=60, what="asking the head for its nodes"))
    return found


def _running(name: str) -> Head | None:
    """Return the cluster if it is known here and its head answers."""
    with contextlib.suppress(ClusterError):
        head = heads.load(name)
        if head.kind == KIND and head.ssh and report(head)["nodes"]:
            return head
    return None


def status(head: Head) -> tuple[Head, list[str]]:
    """Return the cluster as it is now, with what it costs an hour, and sentences that its user has to know.

    Raises:
        ClusterError: Azure does not answer, or nobody is logged in.
    """
    api = Api(sign_in(head.hosts[0].get("subscription") if head.hosts else None))
    with told(f"Asking for the machines of {head.name}"):
        machines = api.machines(group_of(head.name))
        region = getattr(api.group(group_of(head.name)), "location", "")
    if not machines:
        return replace(head, usd_per_hour=0.0), [
            f"Azure has no machine of {head.name}. `launch down {head.name}` ends it."
        ]
    said: list[str] = []
    addresses: dict[str, str] = {}
    try:
        found = report(head) if head.ssh else _NOTHING
        addresses = {node["host"]: node["address"] for node in found["nodes"]}
        said += [one for one in [_complaint(found)] if one]
        said += [found["why_none"]] if found["why_none"] else []
    except ClusterError as error:
        said.append(str(error))
    hosts = []
    for vm in sorted(machines, key=lambda vm: vm["kind"] != ray_yaml.HEAD):
        address = head.hosts[0]["address"] if vm["kind"] == ray_yaml.HEAD else addresses.get(vm["name"], "")
        hosts.append({"name": vm["name"], "address": address, "state": vm["state"], "size": vm["size"]})
    hosts[0]["subscription"] = api.account.subscription
    fresh = replace(head, hosts=hosts, usd_per_hour=_price(machines, region))
    heads.save(fresh)
    return fresh, said


def down(name: str, tell: Tell, subscription: str | None = None) -> None:
    """Remove a cluster whole, and see that nothing is left. May be repeated.

    Raises:
        ClusterError: the group is not one of ours, or Azure does not answer.
        MachineError: something is left; names it.
    """
    name = check_name(name)
    with contextlib.suppress(ClusterError):
        head = heads.load(name)
        subscription = subscription or (head.hosts[0].get("subscription") if head.hosts else None)
        if head.ssh:
            head.shell().close()
    api = Api(sign_in(subscription))
    with told(f"Removing {name}"):
        group = api.group(group_of(name))
        if group is not None:
            _own(group, name)
            tell(f"Deleting the resource group {group_of(name)} and all that is in it.")
        _remove(api, name)


def _remove(api: Api, name: str) -> None:
    api.delete_group(group_of(name))
    if api.group(group_of(name)) is not None:
        left = ", ".join(api.left(group_of(name))) or "nothing in it"
        raise MachineError(
            f"The resource group {group_of(name)} is still there after its deletion, with {left}. Run "
            f"`launch down {name}` again; why it stays is told in Azure's portal, in the group's activity log."
        )
    heads.forget(name)
    for kind in here.KINDS:
        here.file_of(name, kind).unlink(missing_ok=True)


def _own(group: Any, name: str) -> None:
    if (group.tags or {}).get("launch-cluster") != name:
        raise ClusterError(
            f"The resource group {group.name} is not one that launch made (it has no tag launch-cluster), so it is "
            "left alone. Take another cluster.name."
        )


def _usd(wish: Wanted, nodes: int) -> float | None:
    head = wish.nodes.head_usd_per_hour
    price = wish.nodes.node_price
    return None if head is None or price is None else round(head + nodes * price.usd_per_hour, 4)


def _price(machines: Sequence[dict[str, Any]], region: str) -> float | None:
    """Return what machines that run cost an hour, by the table that launch ships."""
    from launcher.clusters import catalogue

    total = 0.0
    for vm in machines:
        if vm["state"] == "deallocated":
            continue
        known = catalogue.sizes().get(vm["size"]) or catalogue.heads().get(vm["size"])
        price = known.price(region, vm["spot"]) if known else None
        if price is None:
            return None
        total += price.usd_per_hour
    return round(total, 4)
