"""Asked of Azure before anything is created: is the size there, in which zone, and is there quota for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.clusters.azure.api import Api, translated_errors
from launcher.clusters.azure.spec import ClusterSpec
from launcher.clusters.pricing.nodes import REGIONAL, SPOT_POOL
from launcher.errors import ResourceError
from launcher.formatting import count


@dataclass(frozen=True)
class QuotaUsage:
    """vCPUs of one quota in one region."""

    limit: int
    used: int


def check(api: Api, wanted: ClusterSpec) -> ClusterSpec:
    """Return what is wanted with its zone chosen.

    Raises:
        ResourceError: no such size there, or not for this subscription, or not in the zone; or too little quota:
            names the family, its limit and what is used.
        ClusterError: Azure does not answer.
    """
    with translated_errors(f"Asking Azure for {wanted.place}"):
        zone = _zone(api, wanted)
        uses = {
            usage.name.value.lower(): QuotaUsage(int(usage.limit), int(usage.current_value))
            for usage in api.compute.usage.list(wanted.nodes.region)
        }
    _check_quota(wanted, uses)
    return replace(wanted, zone=zone)


def _zone(api: Api, wanted: ClusterSpec) -> str | None:
    nodes = wanted.nodes
    names = {nodes.size.name, nodes.head.name}
    listed: dict[str, Any] = {
        sku.name: sku
        for sku in api.compute.resource_skus.list(filter=f"location eq '{nodes.region}'")
        if sku.resource_type == "virtualMachines" and sku.name in names
    }
    zones = {name: _zones_of(listed.get(name), name, nodes.region) for name in names}
    both = sorted(zones[nodes.size.name] & zones[nodes.head.name])
    if wanted.zone is not None and wanted.zone not in both:
        there = f"they are both in zone {', '.join(both)}" if both else "there is no zone that has both"
        raise ResourceError(
            f"cluster.zone={wanted.zone}: {nodes.size.name} and the head ({nodes.head.name}) are not both in this zone "
            f"of {nodes.region} for your subscription; {there}. Take another zone, or leave cluster.zone out."
        )
    return wanted.zone or (both[0] if both else None)


def _zones_of(sku: Any, name: str, region: str) -> set[str]:
    if sku is None:
        raise ResourceError(
            f"{name} is not offered in {region}. Take another cluster.region; `az vm list-skus --size {name}` shows "
            "where it is."
        )
    zones = {zone for info in sku.location_info or [] for zone in info.zones or []}
    for limit in sku.restrictions or []:
        if limit.type == "Location":
            raise ResourceError(
                f"{name} is not available in {region} for your subscription ({limit.reason_code}). Take another "
                "cluster.region or cluster.size, or ask Azure for access to it (https://aka.ms/azurecapacity)."
            )
        zones -= set((limit.restriction_info.zones if limit.restriction_info else None) or [])
    return zones


def _check_quota(wanted: ClusterSpec, uses: dict[str, QuotaUsage]) -> None:
    nodes, size, head = wanted.nodes, wanted.nodes.size, wanted.nodes.head
    vcpus = nodes.nodes * size.vcpus
    told_nodes = f"{count(nodes.nodes, 'node')} of {size.name}"
    _need("the head", [(head.quota_family, head.vcpus), (REGIONAL, head.vcpus)], wanted, uses)
    spot = [(SPOT_POOL, vcpus)]
    shared = head.vcpus if head.quota_family.lower() == size.quota_family.lower() else 0
    on_demand = [(size.quota_family, vcpus + shared), (REGIONAL, vcpus + head.vcpus)]
    if nodes.spot is not False:
        try:
            return _need(f"{told_nodes} as spot", spot, wanted, uses)
        except ResourceError:
            if nodes.spot is True:
                raise
    return _need(told_nodes, on_demand, wanted, uses)


def _need(what: str, needs: Sequence[tuple[str, int]], wanted: ClusterSpec, uses: dict[str, QuotaUsage]) -> None:
    for family, vcpus in needs:
        use = uses.get(family.lower())
        if use is not None and use.used + vcpus > use.limit:
            raise ResourceError(
                f"{what} would need {vcpus} vCPUs of {family} in {wanted.nodes.region}: the quota's limit is "
                f"{use.limit}, and {use.used} are in use. Ask for more (https://aka.ms/azurequota), take fewer "
                "cluster.nodes, another cluster.region or cluster.size, or cluster.spot, which has a quota of its own."
            )
