"""Checks against Azure before anything is created: is the size available, in which zone, and does the quota suffice?"""

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
    """The limit and the current usage of one quota in one region, in vCPUs."""

    limit: int
    used: int


def check(api: Api, spec: ClusterSpec) -> ClusterSpec:
    """Return the specification with its zone chosen.

    Raises:
        ResourceError: the size is not offered in the region, not available to the subscription or not in the zone, or
            a quota is too small. The message names the quota family, its limit and its usage.
        ClusterError: Azure does not answer.
    """
    with translated_errors(f"Querying sizes and quotas for {spec.place}"):
        zone = _zone(api, spec)
        usages = {
            usage.name.value.lower(): QuotaUsage(int(usage.limit), int(usage.current_value))
            for usage in api.compute.usage.list(spec.nodes.region)
        }
    _check_quotas(spec, usages)
    return replace(spec, zone=zone)


def _zone(api: Api, spec: ClusterSpec) -> str | None:
    """Return the configured zone, or the first zone that offers both sizes; None if the region has no zones."""
    nodes = spec.nodes
    names = {nodes.size.name, nodes.head.name}
    listed: dict[str, Any] = {
        sku.name: sku
        for sku in api.compute.resource_skus.list(filter=f"location eq '{nodes.region}'")
        if sku.resource_type == "virtualMachines" and sku.name in names
    }
    zones = {name: _zones_of(listed.get(name), name, nodes.region) for name in names}
    both = sorted(zones[nodes.size.name] & zones[nodes.head.name])
    if spec.zone is not None and spec.zone not in both:
        offered = f"both are offered in zone {', '.join(both)}" if both else "no zone offers both"
        raise ResourceError(
            f"cluster.zone={spec.zone}: {nodes.size.name} and the head ({nodes.head.name}) are not both available in "
            f"this zone of {nodes.region} for your subscription; {offered}. Choose another zone, or omit cluster.zone."
        )
    return spec.zone or (both[0] if both else None)


def _zones_of(sku: Any, name: str, region: str) -> set[str]:
    if sku is None:
        raise ResourceError(
            f"{name} is not offered in {region}. Choose another cluster.region; `az vm list-skus --size {name}` lists "
            "the regions that offer it."
        )
    zones = {zone for info in sku.location_info or [] for zone in info.zones or []}
    for limit in sku.restrictions or []:
        if limit.type == "Location":
            raise ResourceError(
                f"{name} is not available in {region} for your subscription ({limit.reason_code}). Choose another "
                "cluster.region or cluster.size, or request access to the size (https://aka.ms/azurecapacity)."
            )
        zones -= set((limit.restriction_info.zones if limit.restriction_info else None) or [])
    return zones


def _check_quotas(spec: ClusterSpec, usages: dict[str, QuotaUsage]) -> None:
    nodes, size, head = spec.nodes, spec.nodes.size, spec.nodes.head
    vcpus = nodes.nodes * size.vcpus
    what = f"{count(nodes.nodes, 'node')} of {size.name}"
    _require("the head", [(head.quota_family, head.vcpus), (REGIONAL, head.vcpus)], spec, usages)
    spot = [(SPOT_POOL, vcpus)]
    shared = head.vcpus if head.quota_family.lower() == size.quota_family.lower() else 0
    on_demand = [(size.quota_family, vcpus + shared), (REGIONAL, vcpus + head.vcpus)]
    if nodes.spot is not False:
        try:
            return _require(f"{what} as spot", spot, spec, usages)
        except ResourceError:
            if nodes.spot is True:
                raise
    return _require(what, on_demand, spec, usages)


def _require(what: str, needs: Sequence[tuple[str, int]], spec: ClusterSpec, usages: dict[str, QuotaUsage]) -> None:
    for family, vcpus in needs:
        usage = usages.get(family.lower())
        if usage is not None and usage.used + vcpus > usage.limit:
            raise ResourceError(
                f"{what} would need {vcpus} vCPUs of the quota {family} in {spec.nodes.region}, but its limit is "
                f"{usage.limit} and {usage.used} are in use. Request a higher quota (https://aka.ms/azurequota), lower "
                "cluster.nodes, choose another cluster.region or cluster.size, or use cluster.spot, which has a "
                "separate quota."
            )
