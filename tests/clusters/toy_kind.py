"""A cluster kind in one file of a separate package, registered by an entry point, with one key.

Its workers run on this machine, in a Ray cluster with `cluster.toy_cpus` CPUs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.clusters.base import ClusterKind, Machines, Use
from launcher.clusters.capacity import Node
from launcher.config.checks import at_least
from launcher.config.schema import ClusterConfig

if TYPE_CHECKING:
    from launcher.clusters.local.embedded_ray import EmbeddedRay


@dataclass
class ToyCluster(ClusterConfig):
    kind: str = "toy"
    toy_cpus: int = 2


class Toy(ClusterKind):
    name = "toy"
    config = ToyCluster

    def check(self, cluster: ToyCluster) -> None:
        at_least("cluster.toy_cpus", cluster.toy_cpus, 1)

    def machines(self, cluster: ClusterConfig) -> Machines:
        assert isinstance(cluster, ToyCluster)
        return Machines([Node("", "toy", "127.0.0.1", float(cluster.toy_cpus), 0.0)], "a toy cluster")

    def connect(self, cluster: ClusterConfig, use: Use) -> AbstractContextManager[EmbeddedRay]:
        from launcher.clusters.local.embedded_ray import EmbeddedRay

        assert isinstance(cluster, ToyCluster)
        return EmbeddedRay(cluster.toy_cpus, 0, verbose=use.verbose, preload=(use.preload,))


KIND = Toy()
