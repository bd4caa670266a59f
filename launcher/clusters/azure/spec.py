"""What is wanted of Azure, as a value: one cluster in one region and zone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

from launcher.clusters.azure.kind import AzureCluster
from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.clusters.remote import mounts
from launcher.clusters.remote.mounts import Mount
from launcher.config.schema import ScalingConfig
from launcher.errors import ConfigError

LONGEST_NAME = 40  # Ray puts 20 characters around it, and Azure cuts names of VMs at 64
DEFAULT_NAME = "azure"
USER = "ubuntu"
DIRECTORY = f"/home/{USER}/launch"  # on every VM: `env`, `code`, and what launch writes there
PYTHON = f"{DIRECTORY}/env/bin/python"
SPENT_FILE = f"{DIRECTORY}/spent"  # on the head
ALTERNATIVE_KEYS = ("size", "region", "zone", "spot", "nodes", "min_nodes")


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """One cluster.

    Attributes:
        nodes: GPU VMs and the head; `nodes.nodes` is the most of them.
        min_nodes: how many `up` waits for.
        enough: how many of them do, where Azure has no more.
        zone: where all VMs lie; None until Azure has been asked which zones have the size.
        ssh_from: the address (CIDR) that may reach the head.
        mounts: containers of Blob storage that every node shows as directories.
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
        """The resource group, which holds this cluster and nothing else."""
        return group_of(self.name)

    @property
    def unique_id(self) -> str:
        """What Ray tells names of one group by."""
        return sha256(self.group.encode()).hexdigest()[:4]

    @property
    def place(self) -> str:
        """Size, region and zone for people."""
        zone = f" zone {self.zone}" if self.zone else ""
        return f"{self.nodes.size.name} in {self.nodes.region}{zone}"

    @property
    def tags(self) -> dict[str, str]:
        return {"launch-cluster": self.name}


def group_of(name: str) -> str:
    return f"launch-{name}"


def check_name(name: str | None) -> str:
    """Return the name of the cluster. Raises ConfigError where Azure or Ray could not use it."""
    name = name or DEFAULT_NAME
    if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise ConfigError(
            f"cluster.name={name} cannot name a cluster of Azure VMs: take at most {LONGEST_NAME} small letters, "
            "digits and hyphens, a letter first and no hyphen last."
        )
    return name


def cluster_specs(cluster: AzureCluster, ask: bool = True) -> list[ClusterSpec]:
    """Return the cluster that is wanted, and after it the alternatives in their order.

    Args:
        ask: Azure's public list for today's prices.

    Raises:
        ConfigError: no size or an unknown or retired one, a bad name, a bad mount, or an alternative with an unknown
            key.
    """
    if cluster.size is None:
        raise ConfigError("cluster=azure needs cluster.size=SIZE, the size of the GPU VMs; `launch sizes` lists them.")
    found, mounted = [], tuple(mounts.read(cluster.mounts))
    mounts.setup_lines(mounted)  # refuses what is none of a VM
    for each in [cluster, *(_alternative(cluster, one) for one in cluster.alternatives)]:
        nodes = nodes_for(each, ask)
        least = nodes.nodes if each.min_nodes is None else each.min_nodes
        if least > nodes.nodes:
            raise ConfigError(f"cluster.min_nodes={least} is more than cluster.nodes={nodes.nodes}: lower it.")
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


def for_run(wish: ClusterSpec, scaling: ScalingConfig) -> ClusterSpec:
    """Return the cluster with as many nodes to wait for as the workers of a run sit on.

    `cluster.min_nodes` is what the cluster keeps itself to: a run with scaling.workers=auto takes all nodes, and those
    that are to be had where Azure has fewer, `min_nodes` at least.
    """
    size = wish.nodes.size
    gpus = 0.0 if scaling.device == "cpu" else 1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker
    each = max(1, int(min(size.vcpus / scaling.cpus_per_worker, size.gpus / gpus if gpus else math.inf)))
    if scaling.workers == "auto":
        most, least = (wish.nodes.nodes, max(1, wish.min_nodes)) if gpus else (-(-2 // each), 1)
    else:
        most, least = -(-scaling.workers // each), -(-(scaling.min_workers or scaling.workers) // each)
    most = min(wish.nodes.nodes, max(most, wish.min_nodes))
    return replace(wish, min_nodes=most, enough=min(most, max(least, wish.min_nodes)))


def _alternative(cluster: AzureCluster, other: Any) -> AzureCluster:
    unknown = sorted(set(other) - set(ALTERNATIVE_KEYS)) if isinstance(other, Mapping) else [other]
    if unknown:
        raise ConfigError(
            f"cluster.alternatives: {unknown[0]!r} is not known there. Each alternative is a mapping with some of "
            f"{', '.join(ALTERNATIVE_KEYS)}, such as {{size: Standard_NC40ads_H100_v5, region: westeurope}}."
        )
    known = {field.name for field in fields(AzureCluster)}
    # A zone is one of its region's: another region has to say its own.
    moved: dict[str, Any] = {"zone": None} if other.get("region", cluster.region) != cluster.region else {}
    return replace(cluster, **moved, **{key: value for key, value in other.items() if key in known})
