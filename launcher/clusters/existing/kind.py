"""The kind `existing`: a running Ray cluster, which launch neither starts nor stops."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.clusters import capacity, gcs
from launcher.clusters.base import ClusterKind, Machines, Use
from launcher.config.schema import ClusterConfig
from launcher.formatting import count
from launcher.runs.storage import is_gathered, is_uri

if TYPE_CHECKING:
    from launcher.clusters.existing.existing_ray import ExistingRay


@dataclass
class ExistingCluster(ClusterConfig):
    kind: str = "existing"
    # HOST:PORT of its GCS, or the URL of its Ray Jobs API; default: RAY_ADDRESS
    address: str | None = None


class Existing(ClusterKind):
    name = "existing"
    config = ExistingCluster
    attaches = True
    is_rented = True

    def machines(self, cluster: ClusterConfig) -> Machines:
        assert isinstance(cluster, ExistingCluster)
        nodes = gcs.living_nodes(gcs.address_of(cluster.address))
        return Machines(nodes, f"the existing cluster of {count(len(nodes), 'node')}: {capacity.describe(nodes)}")

    def connect(self, cluster: ClusterConfig, use: Use) -> AbstractContextManager[ExistingRay]:
        from launcher.clusters.existing.existing_ray import ExistingRay

        assert isinstance(cluster, ExistingCluster)
        own = None if is_uri(use.directory) else use.directory  # each worker checks an object store itself
        gathers = is_gathered(use.directory)
        return ExistingRay(
            gcs.address_of(cluster.address),
            use.python_path,
            own,
            use.verbose,
            cluster.env,
            gathers=gathers,
            modules=(use.preload,),
        )

    def is_remote(self, cluster: ClusterConfig) -> bool:
        return self.jobs_url(cluster) is not None

    def jobs_url(self, cluster: ClusterConfig) -> str | None:
        assert isinstance(cluster, ExistingCluster)
        address = cluster.address or ""
        return address if address.startswith(("http://", "https://")) else None


KIND = Existing()
