"""The VMs that a run asks for: which, how many, what they cost an hour, and what Azure has to allow and to create.

A value made from the catalogue alone: nothing is asked of Azure but its public list of prices, and nothing is created.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.clusters.pricing.catalogue import Price, Size, Vm, find, find_head
from launcher.clusters.pricing.prices import SOURCE, PricesUnavailable, refreshed
from launcher.config.schema import ClusterConfig
from launcher.formatting import count

SPOT_POOL = "LowPriorityCores"  # Azure counts the vCPUs of all spot VMs of a region under this name
REGIONAL = "cores"  # and those of all others, families together, under this one


@dataclass(frozen=True)
class Quota:
    """vCPUs that a quota of the region must have left. what: for whom."""

    name: str
    vcpus: int
    what: str


@dataclass(frozen=True)
class Nodes:
    """GPU VMs and the head beside them.

    Attributes:
        spot: True, False, or "prefer": spot where there is capacity, else on demand.
        prices_from: where the prices come from, in one line.
    """

    size: Size
    nodes: int
    head: Vm
    region: str
    spot: bool | str
    prices_from: str

    @property
    def node_price(self) -> Price | None:
        """Of one node and hour; the spot price where spot is wanted or preferred."""
        return self.size.price(self.region, spot=self.spot is not False)

    @property
    def counted_price(self) -> Price | None:
        """Of one node and hour in a run's cost: on demand where spot is only preferred, as nodes may come so."""
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
        """Nodes and head together; None where one of the two prices is not known."""
        nodes, head = self.nodes_usd_per_hour, self.head_usd_per_hour
        return None if nodes is None or head is None else round(nodes + head, 6)

    def missing(self) -> list[str]:
        """Return a sentence for each price that is not known."""
        told = []
        kinds = [(self.size, self.spot is not False), (self.head, False)]
        if self.spot == "prefer":
            kinds.insert(1, (self.size, False))
        for vm, spot in kinds:
            if vm.price(self.region, spot) is None:
                others = sorted({price.region for price in vm.prices if price.spot == spot})
                elsewhere = f"; it is known in {', '.join(others)}" if others else ""
                kind = "spot price" if spot else "price"
                told.append(f"The {kind} of {vm.name} in {self.region} is not known{elsewhere}.")
        return told

    def quotas(self) -> list[Quota]:
        """Return what the region's quotas must have left, families first; spot VMs count in a pool of their own."""
        vcpus = self.nodes * self.size.vcpus
        told = count(self.nodes, "node")
        found = []
        if self.spot is not False:
            found.append(Quota(SPOT_POOL, vcpus, f"{told} as spot"))
        if self.spot is not True:
            found.append(Quota(self.size.quota_family, vcpus, told if self.spot is False else f"{told} on demand"))
        found.append(Quota(self.head.quota_family, self.head.vcpus, "the head"))
        on_demand = self.head.vcpus + (0 if self.spot is True else vcpus)
        return [*found, Quota(REGIONAL, on_demand, "all families of the region together")]

    def resources(self) -> list[dict[str, Any]]:
        """Return what Azure would create: {kind, count, what}, in one resource group of the run's own."""
        network = "with accelerated networking" if self.size.accelerated_networking else "no accelerated networking"
        spot = {True: "spot, ", False: "", "prefer": "spot where there is capacity, "}[self.spot]
        listed = (
            ("resource group", 1, "holds all of this, and is deleted as a whole"),
            ("virtual network", 1, "with one subnet; nodes have internal addresses only"),
            ("network security group", 1, "lets SSH in, from the caller's address"),
            ("managed identity", 2, "the head's, which may change this group, and the nodes', which may not"),
            ("public address", 1, "of the head"),
            ("head", 1, f"{self.head.name}, on demand"),
            ("node", self.nodes, f"{self.size.name}, {spot}{network}"),
            ("network interface", self.nodes + 1, "one a VM"),
            ("system disk", self.nodes + 1, "one a VM"),
        )
        return [{"kind": kind, "count": number, "what": what} for kind, number, what in listed]


def nodes_for(cluster: ClusterConfig, ask: bool = True) -> Nodes:
    """Return the VMs that the configuration asks for. ask: Azure's public list for today's prices, if it answers.

    Raises:
        ConfigError: there is no such size (names the nearest), or it is retired (names its successor).
    """
    assert cluster.size is not None
    size, head = find(cluster.size), find_head(cluster.head_size)
    told = "from the table that launch ships"
    if ask:
        try:
            vms: Mapping[str, Vm] = refreshed({size.name: size, head.name: head}, cluster.region)
        except PricesUnavailable as error:
            told += f", since today's could not be had: {error}"
        else:
            found, other = vms[size.name], vms[head.name]
            assert isinstance(found, Size)
            size, head, told = found, other, f"of today from the {SOURCE}, where it has them"
    return Nodes(size, cluster.nodes, head, cluster.region, cluster.spot, f"Prices {told}.")


def _times(number: int, price: Price | None) -> float | None:
    return None if price is None else round(number * price.usd_per_hour, 6)
