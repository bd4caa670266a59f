"""The kind `azure`: VMs of Azure are created, become a Ray cluster, and are deleted."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.clusters.base import ClusterKind, Report
from launcher.config.checks import at_least
from launcher.config.schema import ClusterConfig, ScalingConfig
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.clusters.remote.registry import Head

ANYWHERE = "anywhere"  # the word that opens SSH to every address
_WIDEST = 8  # bits: no owner of a network has a larger one


@dataclass
class AzureCluster(ClusterConfig):
    kind: str = "azure"
    zone: str | None = None  # of the region, one for all VMs; default: the first that has the size
    # Of {size, region, zone, …}: tried in their order where Azure has none.
    alternatives: list[Any] = field(default_factory=list)
    down_after: bool = False  # remove all, the head too, after idle_minutes without work
    launch_attempts: int = 3  # failed launches of GPU VMs after which no further one is tried
    subscription: str | None = None  # of Azure; default: that of `az account show`
    ssh_from: str | None = None  # the address (CIDR) that may reach the head, or `anywhere`; default: this machine's


class Azure(ClusterKind):
    name = "azure"
    config = AzureCluster
    is_rented = True
    makes_mounts = True
    provisions = True
    free_keys = ("zone", "alternatives", "down_after", "launch_attempts")

    def check(self, cluster: AzureCluster) -> None:
        at_least("cluster.launch_attempts", cluster.launch_attempts, 1)
        _check_ssh_from(cluster.ssh_from)

    def is_remote(self, cluster: ClusterConfig) -> bool:
        return True

    def provision(
        self, cluster: ClusterConfig, report: Report, calling: Path | None = None, scaling: ScalingConfig | None = None
    ) -> Head:
        from launcher.clusters.azure import lifecycle

        assert isinstance(cluster, AzureCluster)
        return lifecycle.up(cluster, report, scaling)

    def status(self, head: Head) -> tuple[Head, list[str]]:
        from launcher.clusters.azure import lifecycle

        return lifecycle.status(head)

    def remove(self, name: str, report: Report) -> None:
        from launcher.clusters.azure import lifecycle

        lifecycle.down(name, report)


def _check_ssh_from(value: str | None) -> None:
    if value is None or value == ANYWHERE:
        return
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ConfigError(
            f"cluster.ssh_from is {value!r}, but must be an address or a network in CIDR notation, such as "
            "203.0.113.7/32."
        ) from None
    if network.prefixlen < _WIDEST:
        raise ConfigError(
            f"cluster.ssh_from={value} opens the head's SSH port to {network.num_addresses:,} addresses. Give the "
            "address or network that you connect from, such as 203.0.113.7/32, or leave the key out for this machine's "
            f"address. To open the port to the whole internet write cluster.ssh_from={ANYWHERE}."
        )


KIND = Azure()
