"""Create, inspect and remove clusters of Azure VMs.

head = up(job.cluster, report)       # recorded in ~/.local/state/launch/clusters/NAME.json
head, notes = status(head)
down(name, report)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from launcher.clusters.azure import checks, local_files, network, ray_yaml
from launcher.clusters.azure.api import Api, sign_in, translated_errors
from launcher.clusters.azure.head_creation import NoCapacity, ray_up
from launcher.clusters.azure.kind import KIND, AzureCluster
from launcher.clusters.azure.node_join import complaint, head_report, usd_per_hour, wait
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
from launcher.clusters.base import Report
from launcher.clusters.pricing import catalogue
from launcher.clusters.remote import mounts, registry
from launcher.clusters.remote.registry import Head
from launcher.config.schema import ScalingConfig
from launcher.errors import ClusterError, MachineError, ResourceError, Stopped
from launcher.formatting import count

_ZONE, _SIZE = "launch-zone", "launch-size"  # tags of the resource group: the zone and size it was created for
_UNFINISHED: dict[str, Any] = {
    "nodes": [],
    "why_none": "`launch up` has not completed.",
    "failures": [],
    "monitor_err": "",
}


def up(cluster: AzureCluster, report: Report, scaling: ScalingConfig | None = None) -> Head:
    """Return the configured cluster, which is created if it does not run.

    Args:
        report: called with each line for the user.
        scaling: of the run that needs the cluster: its workers determine the number of nodes to wait for. None: wait
            for `cluster.min_nodes`.

    Raises:
        ConfigError, ResourceError, ClusterError: the cluster cannot be created. Nothing was created.
        MachineError: the creation failed after it began. All created resources were removed again.
    """
    alternatives = [spec if scaling is None else for_run(spec, scaling) for spec in cluster_specs(cluster)]
    name = alternatives[0].name
    api = Api(sign_in(cluster.subscription))
    with translated_errors(f"Looking up the cluster {name}"):
        group = api.group(group_of(name))
    if group is not None:
        _check_owner(group, name)
        if group.properties is not None and group.properties.provisioning_state == "Deleting":
            report(f"The cluster {name} is being removed. Waiting for the end of the removal.")
            with translated_errors(f"Removing {name}"):
                _remove(api, name)
            group = None
    if group is not None:
        return _provision(api, _matching(group, alternatives), group, report)
    refusals: list[str] = []
    began = False
    for spec in alternatives:
        try:
            checked = checks.check(api, spec)
        except ResourceError as error:
            refusals.append(str(error))
            continue
        began = True
        try:
            return _provision(api, checked, None, report)
        except NoCapacity as error:
            refusals.append(str(error))
    if began:
        raise MachineError(" ".join(refusals))
    raise ResourceError(" ".join(refusals))


def _matching(group: Any, alternatives: Sequence[ClusterSpec]) -> ClusterSpec:
    """Return the alternative for which an existing group was created."""
    size = (group.tags or {}).get(_SIZE)
    for spec in alternatives:
        if spec.nodes.region == group.location and size in (None, spec.nodes.size.name):
            return spec
    first = alternatives[0]
    raise ClusterError(
        f"The cluster {first.name} already exists with {size or 'its nodes'} in {group.location}, but "
        f"{first.nodes.size.name} in {first.nodes.region} was requested. Choose another cluster.name, or remove the "
        f"cluster first: launch down {first.name}."
    )


def _provision(api: Api, spec: ClusterSpec, group: Any, report: Report) -> Head:
    """Create what is missing and wait for the nodes. If this fails, remove the resources that this call created."""
    spec = replace(spec, ssh_from=spec.ssh_from or f"{local_files.own_address()}/32")
    if group is not None:
        spec = replace(spec, zone=(group.tags or {}).get(_ZONE) or None)
        head = _running(spec.name)
        if head is not None:
            return wait(api, spec, head, report)
    try:
        head = _create(api, spec, report)
        return wait(api, spec, head, report)
    except (KeyboardInterrupt, Stopped):
        report(f"Interrupted. The created resources cost money until you remove them: launch down {spec.name}")
        raise
    except Exception as error:
        if group is not None:
            raise
        report(f"Removing the resources that were created for {spec.name}.")
        try:
            _remove(api, spec.name)
        except Exception as second:
            raise MachineError(
                f"{error} Removing the created resources failed as well ({second}). Run `launch down {spec.name}`, or "
                f"delete the resource group {spec.group} in the Azure portal."
            ) from error
        raise


def _create(api: Api, spec: ClusterSpec, report: Report) -> Head:
    report(f"Creating {spec.name}: at most {count(spec.nodes.nodes, 'node')}, {spec.place}.")
    key = local_files.key_of(spec.name)
    registry.save(_head(spec, None, api.account.subscription))  # so that `launch down` can remove a partial cluster
    with translated_errors(f"Creating the resource group {spec.group}"):
        tags = {**spec.tags, _ZONE: spec.zone or "", _SIZE: spec.nodes.size.name}
        api.resources.resource_groups.create_or_update(spec.group, {"location": spec.nodes.region, "tags": tags})
    with translated_errors(f"Creating the network of {spec.name}"):
        api.deploy(spec.group, network.DEPLOYMENT, network.template(spec))
        role_lines = _role_lines(api, spec)
    if role_lines:
        report("To let the machines read the storage in cluster.mounts, run these commands once for this cluster:")
        for line in role_lines:
            report(f"  {line}")
    local = ray_yaml.LocalFiles(
        subscription=api.account.subscription,
        key=str(key),
        known_hosts=str(local_files.file_of(spec.name, "hosts")),
        files=local_files.files(spec.name),
        azure=local_files.pins(),
    )
    file = local_files.file_of(spec.name, "yaml")
    file.write_text(ray_yaml.text(spec, local))
    log = local_files.file_of(spec.name, "log")
    report(f"`ray up` creates the head, a {spec.nodes.head.name}. Its log is {log}.")
    ray_up(spec, file)
    with translated_errors(f"Looking up the address of {spec.name}"):
        address = api.head_address(spec.group)
    if address is None:
        raise MachineError(
            f"The head of {spec.name} has no public IP address, so it is unreachable. The log of `ray up` is {log}."
        )
    head = _head(spec, address, api.account.subscription)
    registry.save(head)
    return head


def _role_lines(api: Api, spec: ClusterSpec) -> list[str]:
    if not spec.mounts:
        return []
    identities = network.ids(api.account.subscription, spec)
    return mounts.role_lines(spec.mounts, {role: api.principal(identities[role]) for role in ("head", "nodes")})


def _head(spec: ClusterSpec, address: str | None, subscription: str) -> Head:
    """Return the record of a cluster before its nodes exist. Without an address, the head does not exist either."""
    known_hosts = local_files.file_of(spec.name, "hosts")
    options = [
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        "StrictHostKeyChecking=accept-new",
        "-o",
        f"UserKnownHostsFile={known_hosts}",
    ]
    return Head(
        name=spec.name,
        kind=KIND.name,
        ssh=["ssh", "-i", str(local_files.file_of(spec.name, "key")), *options, f"{USER}@{address}"] if address else [],
        python=PYTHON,
        address=f"127.0.0.1:{ray_yaml.PORT}",
        dashboard=ray_yaml.DASHBOARD,
        directory=DIRECTORY,
        usd_per_hour=spec.nodes.head_usd_per_hour,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hosts=[
            {"name": "head", "address": address or "", "state": "running" if address else "creating"}
            | {"subscription": subscription}
        ],
    )


def _running(name: str) -> Head | None:
    """Return the cluster if it is recorded on this machine and its head answers."""
    with contextlib.suppress(ClusterError):
        head = registry.load(name)
        if head.kind == KIND.name and head.ssh and head_report(head)["nodes"]:
            return head
    return None


def status(head: Head) -> tuple[Head, list[str]]:
    """Return the current state of a cluster with its cost per hour, and notes for its user, one sentence each.

    Raises:
        ClusterError: Azure does not answer, or the user is not logged in.
    """
    api = Api(sign_in(head.hosts[0].get("subscription") if head.hosts else None))
    with translated_errors(f"Listing the machines of {head.name}"):
        machines = api.machines(group_of(head.name))
        region = getattr(api.group(group_of(head.name)), "location", "")
    if not machines:
        return replace(head, usd_per_hour=0.0), [
            f"Azure has no machine of {head.name}. `launch down {head.name}` removes its record."
        ]
    notes: list[str] = []
    addresses: dict[str, str] = {}
    try:
        found = head_report(head) if head.ssh else _UNFINISHED
        addresses = {node["host"]: node["address"] for node in found["nodes"]}
        notes += [note for note in (complaint(found), found["why_none"]) if note]
    except ClusterError as error:
        notes.append(str(error))
    hosts = []
    for vm in sorted(machines, key=lambda vm: vm["kind"] != ray_yaml.HEAD):
        address = head.hosts[0]["address"] if vm["kind"] == ray_yaml.HEAD else addresses.get(vm["name"], "")
        hosts.append({"name": vm["name"], "address": address, "state": vm["state"], "size": vm["size"]})
    hosts[0]["subscription"] = api.account.subscription
    usd = usd_per_hour(machines, region, {**catalogue.sizes(), **catalogue.heads()})
    updated = replace(head, hosts=hosts, usd_per_hour=usd)
    registry.save(updated)
    return updated, notes


def down(name: str, report: Report) -> None:
    """Remove a cluster completely, and check that nothing is left. Idempotent.

    Raises:
        ClusterError: launch did not create the resource group, or Azure does not answer.
        MachineError: resources are left; names them.
    """
    name = check_name(name)
    subscription = None
    with contextlib.suppress(ClusterError):
        head = registry.load(name)
        subscription = head.hosts[0].get("subscription") if head.hosts else None
        if head.ssh:
            head.shell().close()
    api = Api(sign_in(subscription))
    with translated_errors(f"Removing {name}"):
        group = api.group(group_of(name))
        if group is not None:
            _check_owner(group, name)
            report(f"Deleting the resource group {group_of(name)} with all its resources.")
        _remove(api, name)


def _remove(api: Api, name: str) -> None:
    api.delete_group(group_of(name))
    if api.group(group_of(name)) is not None:
        remaining = ", ".join(api.remaining(group_of(name))) or "no resources"
        raise MachineError(
            f"The resource group {group_of(name)} still exists after its deletion, with {remaining}. Run `launch down "
            f"{name}` again. The activity log of the group in the Azure portal shows why it was not deleted."
        )
    registry.forget(name)
    for kind in local_files.KINDS:
        local_files.file_of(name, kind).unlink(missing_ok=True)


def _check_owner(group: Any, name: str) -> None:
    if (group.tags or {}).get("launch-cluster") != name:
        raise ClusterError(
            f"The resource group {group.name} was not created by launch (it has no tag launch-cluster), so launch does "
            "not change it. Choose another cluster.name."
        )
