"""The kind `kuberay`: a run, or a sweep, becomes a RayJob of Kubernetes."""

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
    image: str | None = None  # of head and workers in pods
    context: str | None = None  # of kubectl; default: the current one
    namespace: str = "default"  # of Kubernetes
    secret: str | None = None  # of Kubernetes, whose keys are what `env` names
    service_account: str | None = None  # of the pods, with a workload identity that may reach storage


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
                raise ConfigError(
                    f"cluster.{key} is {value!r}, but must be a name of Kubernetes, such as my-{key[:6]}."
                )
        for key in ("image", "context"):
            value = getattr(cluster, key)
            if value is not None and (not value or value[0] == "-" or not value.isprintable() or " " in value):
                raise ConfigError(f"cluster.{key} is {value!r}, but must be a name without spaces.")

    def machines(self, cluster: ClusterConfig) -> Machines:
        raise ConfigError(
            "cluster=kuberay came from a configuration file, and this command starts workers itself. Give it as a "
            "word: launch … cluster=kuberay makes a RayJob of the run."
        )

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> RayJob:
        from launcher.clusters.kuberay.ray_job import ray_job

        assert isinstance(cluster, KubeRayCluster)
        return ray_job(cluster, run, root, words, ask)


KIND = KubeRay()
