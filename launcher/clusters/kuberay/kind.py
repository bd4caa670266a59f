"""The kind `kuberay`: submits a run or sweep to Kubernetes as a RayJob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.clusters.base import ClusterKind, Machines
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.clusters.kuberay.ray_job import RayJob


@dataclass
class KubeRayCluster(ClusterConfig):
    kind: str = "kuberay"
    image: str | None = None  # container image of head and workers
    context: str | None = None  # of kubectl; default: the current one
    namespace: str = "default"  # of Kubernetes, for all objects of the run
    secret: str | None = None  # Kubernetes secret whose keys are the names in `env`
    service_account: str | None = None  # of the pods, with a workload identity that may access the storage


class KubeRay(ClusterKind):
    name = "kuberay"
    config = KubeRayCluster
    is_batch = True
    is_rented = True
    makes_mounts = True

    def check(self, cluster: KubeRayCluster) -> None:
        name = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
        for key in ("namespace", "secret", "service_account"):
            value = getattr(cluster, key)
            if value is not None and not re.fullmatch(name, value):
                raise ConfigError(f"cluster.{key} is {value!r}, but must be a Kubernetes name, such as my-{key[:6]}.")
        for key in ("image", "context"):
            value = getattr(cluster, key)
            if value is not None and (not value or value[0] == "-" or not value.isprintable() or " " in value):
                raise ConfigError(f"cluster.{key} is {value!r}, but must be a name without spaces.")

    def machines(self, cluster: ClusterConfig) -> Machines:
        raise ConfigError(
            "cluster=kuberay is set in a configuration file, but this command starts the workers itself. Set it on the "
            "command line to submit a RayJob: launch … cluster=kuberay."
        )

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> RayJob:
        from launcher.clusters.kuberay.ray_job import ray_job

        assert isinstance(cluster, KubeRayCluster)
        return ray_job(cluster, run, root, words, ask)


KIND = KubeRay()
