"""The specification of an Azure cluster, as a value: one cluster in one region and zone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

from launcher.clusters.azure.kind import AzureCluster
from launcher.clusters.pricing.catalogue import Size
from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.clusters.remote import mounts
from launcher.clusters.remote.mounts import Mount
from launcher.config.schema import ScalingConfig
from launcher.errors import ConfigError

LONGEST_NAME = 40  # Ray adds 20 characters to it, and Azure truncates VM names to 64
DEFAULT_NAME = "azure"
USER = "ubuntu"
DIRECTORY = f"/home/{USER}/launch"  # on every VM: `env`, `code`, and files that launch writes
PYTHON = f"{DIRECTORY}/env/bin/python"
SPENT_FILE = f"{DIRECTORY}/spent"  # on the head
ALTERNATIVE_KEYS = ("size", "region", "zone", "spot", "nodes", "min_nodes")


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """The specification of one cluster.

    Attributes:
        nodes: the GPU VMs and the head; `nodes.nodes` is the maximum number of GPU VMs.
        min_nodes: the number of nodes for which `up` waits.
        enough: the number of nodes that suffice if Azure has no capacity for more.
        zone: the availability zone of all VMs; None until `checks.check` has chosen one.
        idle_minutes: the time without work after which a node is deleted.
        down_after: whether the whole cluster is removed after that time.
        launch_attempts: the number of failed launches after which no further launch is tried.
        ssh_from: the address (CIDR) that may connect to the head.
        mounts: containers of Blob storage that are mounted on every node.
    """

    name: str
    nodes: Nodes
    min_nodes: int
    zone: str | None
    idle_minutes: float
    down_after: bool
    launch_attempts: int
    enough: int
    ssh_from: str | None = None
    mounts: tuple[Mount, ...] = ()

    @property
    def group(self) -> str:
        """Return the name of the resource group, which contains only this cluster."""
        return group_of(self.name)

    @property
    def unique_id(self) -> str:
        """Return the suffix with which Ray makes the resource names of a group unique."""
        return sha256(self.group.encode()).hexdigest()[:4]

    @property
    def place(self) -> str:
        """Return size, region and zone for messages."""
        zone = f" zone {self.zone}" if self.zone else ""
        return f"{self.nodes.size.name} in {self.nodes.region}{zone}"

    @property
    def tags(self) -> dict[str, str]:
        return {"launch-cluster": self.name}


def group_of(name: str) -> str:
    return f"launch-{name}"


def check_name(name: str | None) -> str:
    """Return the name of the cluster. Raises ConfigError if Azure or Ray does not allow it."""
    name = name or DEFAULT_NAME
    if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise ConfigError(
            f"cluster.name={name} is not a valid name for a cluster of Azure VMs. Use at most {LONGEST_NAME} lowercase "
            "letters, digits and hyphens; the first character must be a letter and the last must not be a hyphen.",
            key="cluster.name",
        )
    return name


def cluster_specs(cluster: AzureCluster, ask: bool = True) -> list[ClusterSpec]:
    """Return the specification of the configured cluster, followed by its alternatives in order.

    Args:
        ask: whether to query Azure's public price list for today's prices.

    Raises:
        ConfigError: the size is missing, unknown or retired, the name or a mount is invalid, or an alternative has an
            unknown key.
    """
    if cluster.size is None:
        raise ConfigError(
            "cluster=azure needs cluster.size=SIZE, the size of the GPU VMs. `launch sizes` lists the sizes.",
            key="cluster.size",
        )
    found, mounted = [], tuple(mounts.read(cluster.mounts))
    mounts.setup_lines(mounted)  # raises ConfigError for mounts that VMs do not support
    for each in [cluster, *(_alternative(cluster, one) for one in cluster.alternatives)]:
        nodes = nodes_for(each, ask)
        _check_driver(nodes.size)
        least = nodes.nodes if each.min_nodes is None else each.min_nodes
        if least > nodes.nodes:
            raise ConfigError(
                f"cluster.min_nodes={least} is more than cluster.nodes={nodes.nodes}. Lower it.",
                key="cluster.min_nodes",
            )
        found.append(
            ClusterSpec(
                name=check_name(each.name),
                nodes=nodes,
                min_nodes=least,
                enough=least,
                zone=None if each.zone is None else str(each.zone),
                idle_minutes=each.idle_minutes,
                down_after=each.down_after,
                launch_attempts=each.launch_attempts,
                ssh_from=each.ssh_from,
                mounts=mounted,
            )
        )
    return found


def _check_driver(size: Size) -> None:
    """Raise ConfigError for sizes whose GPUs do not work with the driver of launch's VM image."""
    if size.driver is not None:
        raise ConfigError(
            f"cluster.size={size.name} needs the NVIDIA {size.driver} driver, but the image of cluster=azure "
            "(ubuntu-hpc) has the datacenter driver, with which the VM has no usable GPU. Choose another size (`launch "
            "sizes`), or create the VMs yourself and use cluster=ssh.",
            key="cluster.size",
        )


def for_run(spec: ClusterSpec, scaling: ScalingConfig) -> ClusterSpec:
    """Return the specification with the number of nodes to wait for that the workers of a run need.

    A run with scaling.workers=auto waits for all nodes. If Azure has capacity for fewer, it uses those that exist, but
    at least `cluster.min_nodes`.
    """
    size = spec.nodes.size
    gpus = 0.0 if scaling.device == "cpu" else 1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker
    each = max(1, int(min(size.vcpus / scaling.cpus_per_worker, size.gpus / gpus if gpus else math.inf)))
    if scaling.workers == "auto":
        most, least = (spec.nodes.nodes, max(1, spec.min_nodes)) if gpus else (-(-2 // each), 1)
    else:
        most, least = -(-scaling.workers // each), -(-(scaling.min_workers or scaling.workers) // each)
    most = min(spec.nodes.nodes, max(most, spec.min_nodes))
    return replace(spec, min_nodes=most, enough=min(most, max(least, spec.min_nodes)))


def _alternative(cluster: AzureCluster, other: Any) -> AzureCluster:
    unknown = sorted(set(other) - set(ALTERNATIVE_KEYS)) if isinstance(other, Mapping) else [other]
    if unknown:
        raise ConfigError(
            f"cluster.alternatives: {unknown[0]!r} is not valid. Each alternative is a mapping with some of the keys "
            f"{', '.join(ALTERNATIVE_KEYS)}, such as {{size: Standard_NC40ads_H100_v5, region: westeurope}}.",
            key="cluster.alternatives",
        )
    known = {field.name for field in fields(AzureCluster)}
    # A zone belongs to its region: an alternative in another region does not inherit it.
    moved: dict[str, Any] = {"zone": None} if other.get("region", cluster.region) != cluster.region else {}
    return replace(cluster, **moved, **{key: value for key, value in other.items() if key in known})
