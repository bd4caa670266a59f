"""Up and down, as far as they go without a machine that answers: what fails is told, and nothing is left of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.clusters.azure import lifecycle, local_files
from launcher.clusters.azure.kind import AzureCluster
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


def said(_: str) -> None:
    pass


def test_a_head_that_azure_refuses_is_told_and_nothing_is_left(azure: Fake) -> None:
    """The whole of `ray up` runs; Azure refuses the VM when group and network are there already."""
    azure.refuse["Standard_D4s_v5", False] = ("InvalidParameter", "The value of parameter imageReference is invalid.")
    with pytest.raises(
        MachineError, match="InvalidParameter: The value of parameter imageReference is invalid"
    ) as caught:
        lifecycle.up(CLUSTER, said)
    assert caught.value.exit_status == 1
    assert azure.left("launch-demo") == []
    assert registry.all_heads() == []
    assert list(registry.directory().iterdir()) == []


def test_who_may_read_the_storage_is_told(azure: Fake) -> None:
    """The identities have no role there, and launch gives none: the container's owner does, with these very lines."""
    azure.refuse["Standard_D4s_v5", False] = ("InvalidParameter", "The value of parameter imageReference is invalid.")
    told: list[str] = []
    made: dict[str, str] = {}

    def tell(line: str) -> None:
        told.append(line)
        for one in azure.of_type("microsoft.managedidentity/userassignedidentities"):
            made[one["name"]] = one["properties"]["principalId"]

    mounted = {"/data": "abfss://images@imagenet.dfs.core.windows.net/2012"}
    with pytest.raises(MachineError):
        lifecycle.up(replace(CLUSTER, mounts=mounted), tell)
    assert [line.split()[5] for line in told if "az role" in line] == [made["demo-head"], made["demo-nodes"]]
    (line, _) = (line for line in told if "az role" in line)
    assert line.strip() == (
        f"az role assignment create --assignee-object-id {made['demo-head']} --assignee-principal-type "
        "ServicePrincipal --role 'Storage Blob Data Reader' --scope \"$(az storage account show --name imagenet "
        '--query id --output tsv)/blobServices/default/containers/images"'
    )


def test_the_next_alternative_where_there_is_no_capacity(azure: Fake) -> None:
    """Each is tried where it stands in the list, and each failed one is removed before the next begins."""
    azure.refuse["Standard_D4s_v5", False] = ("ZonalAllocationFailed", "Allocation failed. No sufficient capacity.")
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    heard: list[str] = []
    others = [{"size": "Standard_NC40ads_H100_v5"}, {"size": "Standard_NC4as_T4_v3"}]
    with pytest.raises(MachineError, match=r"StandardNCADSA100v4Family.*NC40ads_H100.*Allocation.*NC4as_T4"):
        lifecycle.up(replace(CLUSTER, alternatives=others), heard.append)
    assert [line.split(",")[1].split()[0] for line in heard if line.startswith("Creating")] == [
        "Standard_NC40ads_H100_v5",
        "Standard_NC4as_T4_v3",
    ]
    assert azure.left("launch-demo") == []


def test_nothing_is_created_where_the_quota_is_too_small(azure: Fake) -> None:
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    with pytest.raises(ResourceError, match="StandardNCADSA100v4Family") as caught:
        lifecycle.up(CLUSTER, said)
    assert caught.value.exit_status == 2
    assert not [one for one in azure.requests if one.startswith(("PUT", "DELETE"))]


def test_down_deletes_the_group_and_may_be_repeated(azure: Fake) -> None:
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)
    lifecycle.down("demo", said)
    assert azure.left("launch-demo") == []
    assert registry.all_heads() == []
    lifecycle.down("demo", said)


def test_down_that_was_interrupted_is_repeated(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deletion goes on in Azure; the cluster is remembered until it is seen to be gone."""
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("launcher.clusters.azure.api.Api.delete_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lifecycle.down("demo", said)
    assert registry.load("demo") == HEAD
    lifecycle.down("demo", said)
    assert azure.left("launch-demo") == []


def test_what_does_not_go_is_told(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on the group, say: `down` does not believe the answer, it looks."""
    group(azure, **{"launch-cluster": "demo"})
    registry.save(HEAD)
    disk = "/subscriptions/s/resourceGroups/launch-demo/providers/Microsoft.Compute/disks/stays"
    azure.resources[disk.lower()] = {"id": disk, "name": "stays", "type": "Microsoft.Compute/disks"}
    monkeypatch.setattr(azure, "_drop_group", lambda key: None)
    with pytest.raises(MachineError, match=r"still there after its deletion, with Microsoft\.Compute/disks stays"):
        lifecycle.down("demo", said)
    assert registry.load("demo") == HEAD


def test_a_group_of_somebody_else_is_left_alone(azure: Fake) -> None:
    group(azure, owner="somebody")
    for verb in (lambda: lifecycle.down("demo", said), lambda: lifecycle.up(CLUSTER, said)):
        with pytest.raises(ClusterError, match="not one that launch made"):
            verb()
    assert azure.left("launch-demo") == ["launch-demo"]


def test_the_head_gets_what_ray_needs() -> None:
    """The same packages as the extra `azure`, which are those that Ray's provider was written for."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert local_files.pins() == project["optional-dependencies"]["azure"]


def test_status_of_a_cluster_that_somebody_deleted(azure: Fake) -> None:
    fresh, notes = lifecycle.status(HEAD)
    assert fresh.usd_per_hour == 0.0
    assert notes == ["Azure has no machine of demo. `launch down demo` ends it."]


def test_each_machine_costs_what_it_came_for() -> None:
    """cluster.spot=prefer: which node is spot stands in the VM, not in the wish."""
    from launcher.clusters.azure.node_join import usd_per_hour
    from launcher.clusters.pricing import catalogue

    vms = {**catalogue.sizes(), **catalogue.heads()}
    head = {"size": "Standard_D4s_v5", "spot": False, "state": "running"}
    spot, plain, gone = ({**head, "size": A100, "spot": kind} for kind in (True, False, False))
    gone["state"] = "deallocated"
    assert usd_per_hour([head, spot, plain, gone], "eastus", vms) == pytest.approx(0.192 + 0.444 + 3.673)
    assert usd_per_hour([head, {**head, "size": "Standard_M1"}], "eastus", vms) is None


def test_a_cluster_that_is_there_with_another_size_is_not_taken(azure: Fake) -> None:
    group(azure, **{"launch-cluster": "demo", "launch-size": "Standard_NC4as_T4_v3"})
    with pytest.raises(ClusterError, match=r"is there with Standard_NC4as_T4_v3 in eastus.*asked for with .*NC24ads"):
        lifecycle.up(CLUSTER, said)
    with pytest.raises(ClusterError, match=r"in eastus, and was asked for with Standard_NC4as_T4_v3 in westeurope"):
        lifecycle.up(replace(CLUSTER, size="Standard_NC4as_T4_v3", region="westeurope"), said)


def test_a_cluster_that_is_going_is_waited_for(azure: Fake) -> None:
    """Its watchdog has begun to delete it (cluster.down_after): nothing of it is taken for the new one."""
    group(azure, **{"launch-cluster": "demo"})
    azure.groups["launch-demo"]["properties"] = {"provisioningState": "Deleting"}
    azure.usages["StandardNCADSA100v4Family"] = (0, 0)
    with pytest.raises(ResourceError, match="StandardNCADSA100v4Family"):
        lifecycle.up(CLUSTER, said)
    assert azure.left("launch-demo") == []
