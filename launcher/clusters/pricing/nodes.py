"""The VMs of a configuration: size, number, cost per hour, required quotas, and the Azure resources to create.

The value is computed from the catalogue and Azure's public price list. Nothing is created.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.clusters.pricing.catalogue import Price, Size, Vm, find, find_head
from launcher.clusters.pricing.prices import SOURCE, PricesUnavailable, refreshed
from launcher.config.schema import ClusterConfig
from launcher.formatting import count

SPOT_POOL = "LowPriorityCores"  # the quota for the vCPUs of all spot VMs of a region
REGIONAL = "cores"  # the quota for the vCPUs of all other VMs of a region, of all families


@dataclass(frozen=True)
class Quota:
    """The number of free vCPUs that a quota of the region must have, and a description of the VMs that need them."""

    name: str
    vcpus: int
    what: str


@dataclass(frozen=True)
class Nodes:
    """The GPU VMs and the head of a configuration.

    Attributes:
        size: the size of the GPU VMs.
        nodes: the number of GPU VMs.
        head: the size of the head.
        region: the Azure region.
        spot: True, False, or "prefer": spot if there is capacity, otherwise on demand.
        prices_from: the source of the prices, in one sentence.
    """

    size: Size
    nodes: int
    head: Vm
    region: str
    spot: bool | str
    prices_from: str

    @property
    def node_price(self) -> Price | None:
        """Return the price of one node per hour: the spot price if spot is requested or preferred."""
        return self.size.price(self.region, spot=self.spot is not False)

    @property
    def counted_price(self) -> Price | None:
        """Return the price of one node per hour for the cost of a run.

        With spot=prefer it is the on-demand price, because any node may be created on demand.
        """
        return self.size.price(self.region, spot=self.spot is True)

    @property
    def head_price(self) -> Price | None:
        return self.head.price(self.region)

    @property
    def nodes_usd_per_hour(self) -> float | None:
        return _times(self.nodes, self.node_price)

    @property
    def nodes_usd_per_hour_on_demand(self) -> float | None:
        return _times(self.nodes, self.size.price(self.region))

    @property
    def head_usd_per_hour(self) -> float | None:
        return _times(1, self.head_price)

    @property
    def usd_per_hour(self) -> float | None:
        """Return the cost of nodes and head per hour; None if one of the prices is unknown."""
        nodes, head = self.nodes_usd_per_hour, self.head_usd_per_hour
        return None if nodes is None or head is None else round(nodes + head, 6)

    def missing(self) -> list[str]:
        """Return a sentence for each unknown price."""
        missing = []
        kinds = [(self.size, self.spot is not False), (self.head, False)]
        if self.spot == "prefer":
            kinds.insert(1, (self.size, False))
        for vm, spot in kinds:
            if vm.price(self.region, spot) is None:
                others = sorted({price.region for price in vm.prices if price.spot == spot})
                known = f"; it is known in {', '.join(others)}" if others else ""
                kind = "spot price" if spot else "price"
                missing.append(f"The {kind} of {vm.name} in {self.region} is unknown{known}.")
        return missing

    def quotas(self) -> list[Quota]:
        """Return the quotas that the VMs need, families first. Spot VMs have a separate quota."""
        vcpus = self.nodes * self.size.vcpus
        nodes = count(self.nodes, "node")
        found = []
        if self.spot is not False:
            found.append(Quota(SPOT_POOL, vcpus, f"{nodes} as spot"))
        if self.spot is not True:
            found.append(Quota(self.size.quota_family, vcpus, nodes if self.spot is False else f"{nodes} on demand"))
        found.append(Quota(self.head.quota_family, self.head.vcpus, "the head"))
        on_demand = self.head.vcpus + (0 if self.spot is True else vcpus)
        return [*found, Quota(REGIONAL, on_demand, "all families of the region")]

    def resources(self) -> list[dict[str, Any]]:
        """Return the Azure resources to create, each {kind, count, what}, all in one new resource group."""
        network = "with accelerated networking" if self.size.accelerated_networking else "no accelerated networking"
        spot = {True: "spot, ", False: "", "prefer": "spot if there is capacity, "}[self.spot]
        listed = (
            ("resource group", 1, "contains all other resources; `launch down` deletes it"),
            ("virtual network", 1, "with one subnet; nodes have private addresses only"),
            ("network security group", 1, "allows SSH from the caller's address"),
            ("managed identity", 2, "of the head, which may change this group, and of the nodes, which may not"),
            ("public address", 1, "of the head"),
            ("head", 1, f"{self.head.name}, on demand"),
            ("node", self.nodes, f"{self.size.name}, {spot}{network}"),
            ("network interface", self.nodes + 1, "one per VM"),
            ("system disk", self.nodes + 1, "one per VM"),
        )
        return [{"kind": kind, "count": number, "what": what} for kind, number, what in listed]


def nodes_for(cluster: ClusterConfig, ask: bool = True) -> Nodes:
    """Return the VMs of a configuration with `cluster.size`.

    Args:
        ask: whether to query Azure's public price list for today's prices. If it does not answer, the prices of the
            catalogue are used.

    Raises:
        ConfigError: the size does not exist (names the most similar one), or is retired (names its successor).
    """
    assert cluster.size is not None
    size, head = find(cluster.size), find_head(cluster.head_size)
    source = "from the catalogue of launch"
    if ask:
        try:
            vms: Mapping[str, Vm] = refreshed({size.name: size, head.name: head}, cluster.region)
        except PricesUnavailable as error:
            source += f", because today's prices are not available: {error}"
        else:
            found, other = vms[size.name], vms[head.name]
            assert isinstance(found, Size)
            size, head, source = found, other, f"of today from the {SOURCE}, otherwise from the catalogue of launch"
    return Nodes(size, cluster.nodes, head, cluster.region, cluster.spot, f"Prices {source}.")


def _times(number: int, price: Price | None) -> float | None:
    return None if price is None else round(number * price.usd_per_hour, 6)
