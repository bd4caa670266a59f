"""Up and down without machines that answer: failures are reported, and no resource is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.clusters.azure import lifecycle, local_files
from launcher.clusters.azure.kind import AzureCluster
from launcher.clusters.azure.node_join import usd_per_hour
from launcher.clusters.pricing import catalogue
from launcher.clusters.remote import registry
from launcher.clusters.remote.registry import Head
from launcher.errors import ClusterError, MachineError, ResourceError
from tests.azure.conftest import A100
from tests.azure.fake import SUBSCRIPTION, Fake
from tests.support.vmlab.lab import ROOT

CLUSTER = AzureCluster(name="demo", size=A100, ssh_from="203.0.113.7/32")
HEAD = Head(
    name="demo",
    kind="azure",
    ssh=["ssh", "-p", "9", "-o", "ControlPath=none", "ubuntu@127.0.0.1"],
    python="python3",
    address="10.0.0.4:6379",
    dashboard=8265,
    directory="/home/ubuntu/launch",
    hosts=[{"name": "head", "address": "127.0.0.1", "state": "running", "subscription": SUBSCRIPTION}],
)


def group(azure: Fake, name: str = "launch-demo", **tags: str) -> None:
    azure.groups[name] = {
        "id": f"/subscriptions/s/resourceGroups/{name}",
        "name": name,
        "location": "eastus",
        "tags": tags,
    }


def ignore(_: str) -> None:
    pass


def test_a_rejected_head_is_reported_and_nothing_is_left(azure: Fake) -> None:
    """`ray up` runs completely, and Azure rejects the VM after group and network were created."""
    azure.refuse["Standard_D4s_v5", False] = ("InvalidParameter", "The value of parameter imageReference is invalid.")
    with pytest.raises(
        MachineError, match="InvalidParameter: The value of parameter imageReference is invalid"
    ) as caught:
        lifecycle.up(CLUSTER, ignore)
    assert caught.value.exit_status == 1
    assert azure.remaining("launch-demo") == []
    assert registry.all_heads() == []
    assert list(registry.directory().iterdir()) == []


def test_the_commands_that_grant_access_to_storage_are_printed(azure: Fake) -> None:
    """The identities have no role for the storage. The owner of the container assigns it with these commands."""
    azure.refuse["Standard_D4s_v5", False] = ("InvalidParameter", "The value of parameter imageReference is invalid.")
    lines: list[str] = []
    principals: dict[str, str] = {}

    def report(line: str) -> None:
        lines.append(line)
        for one in azure.of_type("microsoft.managedidentity/userassignedidentities"):
            principals[one["name"]] = one["properties"]["principalId"]

    mounted = {"/data": "abfss://images@imagenet.dfs.core.windows.net/2012"}
    with pytest.raises(MachineError):
        lifecycle.up(replace(CLUSTER, mounts=mounted), report)
    assert [line.split()[5] for line in lines if "az role" in line] == [
        principals["demo-head"],
        principals["demo-nodes"],
    ]
    (line, _) = (line for line in lines if "az role" in line)
    assert line.strip() == (
        f"az role assignment create --assignee-object-id {principals['demo-head']} --assignee-principal-type "
        "ServicePrincipal --role 'Storage Blob Data Reader' --scope \"$(az storage account show --name imagenet "
        '--query id --output tsv)/blobServices/default/containers/images"'
    )


def test_the_next_alternative_is_tried_without_capacity(azure: Fake) -> None:
    """The alternatives are tried in order, and each failed one is removed before the next starts."""
    azure.refuse["Standard_D4s_v5", False] = ("ZonalAllocationFailed", "Allocation failed. No sufficient capacity.")
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    lines: list[str] = []
    others = [{"size": "Standard_NC40ads_H100_v5"}, {"size": "Standard_NC4as_T4_v3"}]
    with pytest.raises(MachineError, match=r"StandardNCADSA100v4Family.*NC40ads_H100.*Allocation.*NC4as_T4"):
        lifecycle.up(replace(CLUSTER, alternatives=others), lines.append)
    assert [line.split(",")[1].split()[0] for line in lines if line.startswith("Creating")] == [
        "Standard_NC40ads_H100_v5",
        "Standard_NC4as_T4_v3",
    ]
    assert azure.remaining("launch-demo") == []


def test_nothing_is_created_with_a_small_quota(azure: Fake) -> None:
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    with pytest.raises(ResourceError, match="StandardNCADSA100v4Family") as caught:
        lifecycle.up(CLUSTER, ignore)
    assert caught.value.exit_status == 2
    assert not [one for one in azure.requests if one.startswith(("PUT", "DELETE"))]


def test_down_deletes_the_group_and_is_idempotent(azure: Fake) -> None:
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)
    lifecycle.down("demo", ignore)
    assert azure.remaining("launch-demo") == []
    assert registry.all_heads() == []
    lifecycle.down("demo", ignore)


def test_an_interrupted_down_can_be_repeated(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure continues the deletion, and the record is kept until the group no longer exists."""
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("launcher.clusters.azure.api.Api.delete_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lifecycle.down("demo", ignore)
    assert registry.load("demo") == HEAD
    lifecycle.down("demo", ignore)
    assert azure.remaining("launch-demo") == []


def test_remaining_resources_are_reported(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example with a lock on the group. `down` checks the group instead of trusting the response."""
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)
    disk = "/subscriptions/s/resourceGroups/launch-demo/providers/Microsoft.Compute/disks/stays"
    azure.resources[disk.lower()] = {"id": disk, "name": "stays", "type": "Microsoft.Compute/disks"}
    monkeypatch.setattr(azure, "_drop_group", lambda key: None)
    with pytest.raises(MachineError, match=r"Microsoft\.Compute/disks stays"):
        lifecycle.down("demo", ignore)
    assert registry.load("demo") == HEAD


def test_a_group_of_another_owner_is_not_changed(azure: Fake) -> None:
    group(azure, owner="another")
    for verb in (lambda: lifecycle.down("demo", ignore), lambda: lifecycle.up(CLUSTER, ignore)):
        with pytest.raises(ClusterError, match="no tag launch-cluster"):
            verb()
    assert azure.remaining("launch-demo") == ["launch-demo"]


def test_the_head_gets_the_packages_of_the_extra() -> None:
    """They are the versions that Ray's provider supports."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert local_files.pins() == project["optional-dependencies"]["azure"]


def test_status_of_a_deleted_cluster(azure: Fake) -> None:
    fresh, notes = lifecycle.status(HEAD)
    assert fresh.usd_per_hour == 0.0
    assert "launch down demo" in notes[0]


def test_each_machine_has_its_spot_or_on_demand_price() -> None:
    """With cluster.spot=prefer, only the VM shows whether a node is spot."""
    vms = {**catalogue.sizes(), **catalogue.heads()}
    head = {"size": "Standard_D4s_v5", "spot": False, "state": "running"}
    spot, plain, gone = ({**head, "size": A100, "spot": kind} for kind in (True, False, False))
    gone["state"] = "deallocated"
    assert usd_per_hour([head, spot, plain, gone], "eastus", vms) == pytest.approx(0.192 + 0.444 + 3.673)
    assert usd_per_hour([head, {**head, "size": "Standard_M1"}], "eastus", vms) is None


def test_a_cluster_with_another_size_is_not_reused(azure: Fake) -> None:
    group(azure, **{"launch-cluster": "demo", "launch-size": "Standard_NC4as_T4_v3"})
    with pytest.raises(ClusterError, match=r"Standard_NC4as_T4_v3 in eastus.*NC24ads"):
        lifecycle.up(CLUSTER, ignore)
    with pytest.raises(ClusterError, match=r"in eastus.*Standard_NC4as_T4_v3 in westeurope"):
        lifecycle.up(replace(CLUSTER, size="Standard_NC4as_T4_v3", region="westeurope"), ignore)


def test_a_cluster_that_is_being_deleted_is_awaited(azure: Fake) -> None:
    """Its watchdog has started to delete it (cluster.down_after). The new cluster reuses none of its resources."""
    group(azure, **{"launch-cluster": "demo"})
    azure.groups["launch-demo"]["properties"] = {"provisioningState": "Deleting"}
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    with pytest.raises(ResourceError, match="StandardNCADSA100v4Family"):
        lifecycle.up(CLUSTER, ignore)
    assert azure.remaining("launch-demo") == []
