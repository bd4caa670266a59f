"""Clusters of Azure VMs come up, are looked at, and go down as a whole.

head = up(job.cluster, tell)       # ~/.local/state/launch/clusters/NAME.json knows it from then on
head, told = status(head)
down(name, tell)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from launcher.clusters.azure import checks, local_files, network, ray_yaml
from launcher.clusters.azure.api import Api, sign_in, translated_errors
from launcher.clusters.azure.head_creation import NoCapacity, ray_up
from launcher.clusters.azure.kind import KIND, AzureCluster
from launcher.clusters.azure.node_join import complaint, report, usd_per_hour, wait
from launcher.clusters.azure.spec import (
    DIRECTORY,
    PYTHON,
    USER,
    ClusterSpec,
    check_name,
    cluster_specs,
    for_run,
    group_of,
)
from launcher.clusters.pricing import catalogue
from launcher.clusters.remote import mounts, registry
from launcher.clusters.remote.registry import Head
from launcher.config.schema import ScalingConfig
from launcher.errors import ClusterError, MachineError, ResourceError, Stopped
from launcher.formatting import count

_ZONE, _SIZE = "launch-zone", "launch-size"  # tags of the group: what it was made for
Tell = Callable[[str], None]
_NOTHING: dict[str, Any] = {
    "nodes": [],
    "why_none": "`launch up` has not come to its end.",
    "failures": [],
    "monitor_err": "",
}


def up(cluster: AzureCluster, tell: Tell, scaling: ScalingConfig | None = None) -> Head:
    """Return the cluster that is wanted; make it where it does not run.

    Args:
        tell: is given a line for the user now and then.
        scaling: of the run that it is for, whose workers' nodes are waited for; None: for `cluster.min_nodes` of them.

    Raises:
        ConfigError, ResourceError, ClusterError: it cannot be made; nothing was created.
        MachineError: it was begun and failed; what was created is removed again.
    """
    alternatives = [one if scaling is None else for_run(one, scaling) for one in cluster_specs(cluster)]
    name = alternatives[0].name
    api = Api(sign_in(cluster.subscription))
    with translated_errors(f"Looking for the cluster {name}"):
        group = api.group(group_of(name))
    if group is not None:
        _own(group, name)
        if group.properties is not None and group.properties.provisioning_state == "Deleting":
            tell(f"The cluster {name} is being removed; that is waited for.")
            with translated_errors(f"Removing {name}"):
                _remove(api, name)
            group = None
    if group is not None:
        return _make(api, _begun(group, alternatives), group, tell)
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
        except NoCapacity as error:
            refused.append(str(error))
    if began:
        raise MachineError(" ".join(refused))
    raise ResourceError(" ".join(refused))


def _begun(group: Any, alternatives: Sequence[ClusterSpec]) -> ClusterSpec:
    """Return the alternative that a group was made for."""
    size = (group.tags or {}).get(_SIZE)
    for one in alternatives:
        if one.nodes.region == group.location and size in (None, one.nodes.size.name):
            return one
    first = alternatives[0]
    raise ClusterError(
        f"The cluster {first.name} is there with {size or 'its nodes'} in {group.location}, and was asked for with "
        f"{first.nodes.size.name} in {first.nodes.region}. Take another cluster.name, or remove it first: "
        f"launch down {first.name}."
    )


def _make(api: Api, wish: ClusterSpec, group: Any, tell: Tell) -> Head:
    """Create what is missing and wait for the nodes. What this call created it removes again where it fails."""
    wish = replace(wish, ssh_from=wish.ssh_from or f"{local_files.own_address()}/32")
    if group is not None:
        wish = replace(wish, zone=(group.tags or {}).get(_ZONE) or None)
        head = _running(wish.name)
        if head is not None:
            return wait(api, wish, head, tell)
    try:
        head = _create(api, wish, tell)
        return wait(api, wish, head, tell)
    except (KeyboardInterrupt, Stopped):
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


def _create(api: Api, wish: ClusterSpec, tell: Tell) -> Head:
    tell(f"Creating {wish.name}: {count(wish.nodes.nodes, 'node')} at most, {wish.place}.")
    key = local_files.key_of(wish.name)
    registry.save(_head(wish, None, api.account.subscription))  # so that `down` finds what is begun
    with translated_errors(f"Creating the resource group {wish.group}"):
        tags = {**wish.tags, _ZONE: wish.zone or "", _SIZE: wish.nodes.size.name}
        api.resources.resource_groups.create_or_update(wish.group, {"location": wish.nodes.region, "tags": tags})
    with translated_errors(f"Creating the network of {wish.name}"):
        api.deploy(wish.group, network.DEPLOYMENT, network.template(wish))
        granted = _roles(api, wish)
    if granted:
        tell("Its machines may read what cluster.mounts names once you have said so, once for this cluster:")
        for line in granted:
            tell(f"  {line}")
    local = ray_yaml.LocalFiles(
        subscription=api.account.subscription,
        key=str(key),
        known_hosts=str(local_files.file_of(wish.name, "hosts")),
        files=local_files.files(wish.name),
        azure=local_files.pins(),
    )
    file = local_files.file_of(wish.name, "yaml")
    file.write_text(ray_yaml.text(wish, local))
    tell(f"Ray makes the head, a {wish.nodes.head.name}; its words go to {local_files.file_of(wish.name, 'log')}.")
    ray_up(wish, file)
    with translated_errors(f"Asking for the address of {wish.name}"):
        address = api.head_address(wish.group)
    if address is None:
        raise MachineError(f"The head of {wish.name} has no public address.")
    head = _head(wish, address, api.account.subscription)
    registry.save(head)
    return head


def _roles(api: Api, wish: ClusterSpec) -> list[str]:
    if not wish.mounts:
        return []
    base = network.ids(api.account.subscription, wish)
    return mounts.role_lines(wish.mounts, {who: api.principal(base[who]) for who in ("head", "nodes")})


def _head(wish: ClusterSpec, address: str | None, subscription: str) -> Head:
    """Return the cluster as it is before its nodes; without an address it has begun to be made."""
    known = local_files.file_of(wish.name, "hosts")
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
        kind=KIND.name,
        ssh=["ssh", "-i", str(local_files.file_of(wish.name, "key")), *options, f"{USER}@{address}"] if address else [],
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


def _running(name: str) -> Head | None:
    """Return the cluster if it is known here and its head answers."""
    with contextlib.suppress(ClusterError):
        head = registry.load(name)
        if head.kind == KIND.name and head.ssh and report(head)["nodes"]:
            return head
    return None


def status(head: Head) -> tuple[Head, list[str]]:
    """Return the cluster as it is now, with what it costs an hour, and sentences that its user has to know.

    Raises:
        ClusterError: Azure does not answer, or nobody is logged in.
    """
    api = Api(sign_in(head.hosts[0].get("subscription") if head.hosts else None))
    with translated_errors(f"Asking for the machines of {head.name}"):
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
        said += [one for one in [complaint(found)] if one]
        said += [found["why_none"]] if found["why_none"] else []
    except ClusterError as error:
        said.append(str(error))
    hosts = []
    for vm in sorted(machines, key=lambda vm: vm["kind"] != ray_yaml.HEAD):
        address = head.hosts[0]["address"] if vm["kind"] == ray_yaml.HEAD else addresses.get(vm["name"], "")
        hosts.append({"name": vm["name"], "address": address, "state": vm["state"], "size": vm["size"]})
    hosts[0]["subscription"] = api.account.subscription
    fresh = replace(
        head, hosts=hosts, usd_per_hour=usd_per_hour(machines, region, {**catalogue.sizes(), **catalogue.heads()})
    )
    registry.save(fresh)
    return fresh, said


def down(name: str, tell: Tell, subscription: str | None = None) -> None:
    """Remove a cluster whole, and see that nothing is left. May be repeated.

    Raises:
        ClusterError: the group is not one of ours, or Azure does not answer.
        MachineError: something is left; names it.
    """
    name = check_name(name)
    with contextlib.suppress(ClusterError):
        head = registry.load(name)
        subscription = subscription or (head.hosts[0].get("subscription") if head.hosts else None)
        if head.ssh:
            head.shell().close()
    api = Api(sign_in(subscription))
    with translated_errors(f"Removing {name}"):
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
    registry.forget(name)
    for kind in local_files.KINDS:
        local_files.file_of(name, kind).unlink(missing_ok=True)


def _own(group: Any, name: str) -> None:
    if (group.tags or {}).get("launch-cluster") != name:
        raise ClusterError(
            f"The resource group {group.name} is not one that launch made (it has no tag launch-cluster), so it is "
            "left alone. Take another cluster.name."
        )
