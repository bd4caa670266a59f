"""The subclass of Ray's Azure provider, with the fake of Azure. VMs are only records of the fake."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException

from launcher.clusters.azure import failures, network, ray_yaml
from launcher.clusters.azure.api import Api, sign_in
from tests.azure.conftest import A100
from tests.azure.fake import NIC, VM, Fake
from tests.azure.test_spec import spec_of

KIND, NAME = "ray-node-type", "ray-node-name"
CAPACITY = ("SkuNotAvailable", "The requested size is currently not available in location eastus zone 2.")


class Cluster:
    """A resource group with its network, and the provider as it is configured on the head."""

    def __init__(self, azure: Fake, directory: Path, **keys: Any) -> None:
        from launcher.clusters.azure.provider import Provider

        self.spec = spec_of(**keys)
        api = Api(sign_in())
        api.resources.resource_groups.create_or_update(self.spec.group, {"location": "eastus", "tags": self.spec.tags})
        api.deploy(self.spec.group, network.DEPLOYMENT, network.template(self.spec))
        key = directory / "key"
        key.write_text("secret")
        key.with_suffix(".pub").write_text("ssh-rsa AAAA")
        hosts = str(directory / "hosts")
        local = ray_yaml.LocalFiles(subscription=api.account.subscription, key=str(key), known_hosts=hosts, files={})
        self.config = Provider.bootstrap_config(ray_yaml.ray_config(self.spec, local))
        self.provider = Provider(self.config["provider"], self.spec.name)

    def create(self, kind: str, count: int = 1) -> None:
        tags = {KIND: "head" if kind == "head" else "worker", "ray-user-node-type": kind, NAME: f"ray-demo-{kind}"}
        config = self.config["available_node_types"][kind]["node_config"]
        self.provider.create_node_with_resources_and_labels(config, tags, count, {}, {})


@pytest.fixture
def cluster(azure: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv(failures.VARIABLE, str(tmp_path / "failures"))
    return Cluster(azure, tmp_path, nodes=3, spot="prefer", launch_attempts=2)


def test_only_the_head_may_change_the_group(azure: Fake, cluster: Cluster) -> None:
    """Ray lets every worker delete the cluster. With launch, a worker's identity has no role in the group."""
    cluster.create("head")
    cluster.create("node", 2)
    identities = {}
    for vm in azure.of_type(VM):
        (identity,) = vm["identity"]["userAssignedIdentities"]
        identities[vm["tags"]["ray-user-node-type"], vm["name"]] = identity.rpartition("/")[2]
    assert sorted(identities.values()) == ["demo-head", "demo-nodes", "demo-nodes"]
    assert {name for (kind, _), name in identities.items() if kind == "head"} == {"demo-head"}
    (role,) = azure.of_type("microsoft.authorization/roleassignments")
    assert role["properties"]["of"] == ["demo-head"]


def test_the_created_resources(azure: Fake, cluster: Cluster) -> None:
    """One zone, accelerated networking, spot up to the on-demand price, one public address, SSH from one address."""
    cluster.create("head")
    cluster.create("node", 2)
    vms = azure.of_type(VM)
    assert [vm["zones"] for vm in vms] == [["2"]] * 3
    assert {vm["properties"]["storageProfile"]["imageReference"]["offer"] for vm in vms} == {"ubuntu-hpc"}
    assert all(nic["properties"]["enableAcceleratedNetworking"] for nic in azure.of_type(NIC))
    spot = [vm for vm in vms if vm["properties"]["priority"] == "Spot"]
    assert len(spot) == 2
    assert all(vm["properties"]["billingProfile"] == {"maxPrice": -1} for vm in spot)
    assert all(vm["properties"]["evictionPolicy"] == "Delete" for vm in spot)
    assert len(azure.of_type("microsoft.network/publicipaddresses")) == 1
    (group,) = azure.of_type("microsoft.network/networksecuritygroups")
    assert [rule["properties"]["sourceAddressPrefix"] for rule in group["properties"]["securityRules"]] == [
        "203.0.113.7/32"
    ]
    assert len({vm["name"] for vm in vms}) == 3


def test_nodes_are_listed_created_and_deleted(azure: Fake, cluster: Cluster) -> None:
    """As Ray's autoscaler does. Disk and network interface of a node are deleted with it."""
    cluster.create("head")
    cluster.create("node", 2)
    provider = cluster.provider
    workers = provider.non_terminated_nodes({KIND: "worker"})
    assert len(workers) == 2
    assert {provider.internal_ip(name).rpartition(".")[0] for name in workers} == {"10.77.0"}
    (head,) = provider.non_terminated_nodes({KIND: "head"})
    assert provider.external_ip(head).startswith("198.51.100.")
    provider.terminate_nodes(workers)
    provider.termination_executor.shutdown(wait=True)
    assert provider.non_terminated_nodes({KIND: "worker"}) == []
    assert len(azure.of_type("microsoft.compute/disks")) == len(azure.of_type(NIC)) == 1  # the head's


def test_an_evicted_vm_is_not_listed(azure: Fake, cluster: Cluster) -> None:
    cluster.create("node", 2)
    first, second = cluster.provider.non_terminated_nodes({})
    azure.evict(first)
    assert cluster.provider.non_terminated_nodes({}) == [second]


def test_rejected_spot_nodes_are_created_on_demand(azure: Fake, cluster: Cluster) -> None:
    """Ray's autoscaler would retry spot forever. After launch_attempts failures, spot is not tried for half an hour."""
    azure.refuse[A100, True] = CAPACITY
    for _ in range(3):
        cluster.create("node")
    machines = azure.of_type(VM)
    assert [vm["properties"]["priority"] for vm in machines] == ["Regular"] * 3
    assert {next(iter(vm["identity"]["userAssignedIdentities"])).rpartition("/")[2] for vm in machines} == {
        "demo-nodes"
    }
    assert [(one.kind, one.code) for one in failures.read()] == [("spot", "SkuNotAvailable")] * 2
    assert failures.recent("spot") == 2
    assert failures.recent("spot", now=time.time() + failures.EXPIRY_SECONDS) == 0


def test_failed_launches_are_recorded_and_limited(azure: Fake, cluster: Cluster) -> None:
    """The innermost cause is recorded. After launch_attempts failures there are no further requests for a while."""
    azure.refuse |= {(A100, True): CAPACITY, (A100, False): CAPACITY}
    for _ in range(2):
        with pytest.raises(NodeLaunchException, match=r"SkuNotAvailable.*currently not available"):
            cluster.create("node")
    requests = len(azure.requests)
    with pytest.raises(NodeLaunchException, match=r"TooManyFailures"):
        cluster.create("node")
    assert len(azure.requests) == requests
    azure.refuse.clear()
    failures.path().write_text("")
    cluster.create("node")
    assert failures.read() == []


def test_the_provider_does_not_list_sizes(azure: Fake, cluster: Cluster) -> None:
    """The head's identity has access to its group only, so Ray's query for zones would fail."""
    cluster.create("node")
    assert not [one for one in azure.requests if one.endswith("/skus")]
