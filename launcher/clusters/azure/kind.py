"""The kind `azure`: creates and deletes Azure VMs that form a Ray cluster."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.clusters.base import ClusterKind, Report
from launcher.config.checks import at_least
from launcher.config.schema import ClusterConfig, ScalingConfig
from launcher.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from launcher.clusters.remote.registry import Head

ANYWHERE = "anywhere"  # value of cluster.ssh_from that allows SSH from every address
_MIN_PREFIX_BITS = 8  # no organization owns a larger network


@dataclass
class AzureCluster(ClusterConfig):
    kind: str = "azure"
    zone: str | None = None  # availability zone of all VMs; default: the first that offers the size
    # Each with some of size, region, zone, …; tried in order if Azure has no capacity.
    alternatives: list[Any] = field(default_factory=list)
    down_after: bool = False  # remove the whole cluster, including the head, after idle_minutes without work
    launch_attempts: int = 3  # failed launches of GPU VMs after which no further launch is tried
    subscription: str | None = None  # id or name; default: that of `az account show`
    ssh_from: str | None = None  # address (CIDR) that may connect to the head, or `anywhere`; default: this machine's


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
        assert isinstance(cluster, AzureCluster)
        head: Head = _lifecycle().up(cluster, report, scaling)
        return head

    def status(self, head: Head) -> tuple[Head, list[str]]:
        found: tuple[Head, list[str]] = _lifecycle().status(head)
        return found

    def remove(self, name: str, report: Report) -> None:
        _lifecycle().down(name, report)


def _lifecycle() -> Any:
    """Import the module with up, status and down. Raises ClusterError if the packages of Azure are not installed."""
    try:
        from launcher.clusters.azure import lifecycle
    except ImportError as error:
        if not (error.name or "").startswith(("azure", "msrest")):
            raise
        raise ClusterError(
            f"cluster=azure needs Azure's Python packages ({error.name} is missing). Install them with: pip install "
            "'launch-train[azure]'."
        ) from None
    return lifecycle


def _check_ssh_from(value: str | None) -> None:
    if value is None or value == ANYWHERE:
        return
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ConfigError(
            f"cluster.ssh_from is {value!r}, but must be an address or a network in CIDR notation, such as "
            "203.0.113.7/32.",
            key="cluster.ssh_from",
        ) from None
    if network.prefixlen < _MIN_PREFIX_BITS:
        raise ConfigError(
            f"cluster.ssh_from={value} opens the head's SSH port to {network.num_addresses:,} addresses. Set it to the "
            "address or network that you connect from, such as 203.0.113.7/32, or omit the key to allow only the "
            f"address of this machine. To open the port to the whole internet, set cluster.ssh_from={ANYWHERE}.",
            key="cluster.ssh_from",
        )


KIND = Azure()
