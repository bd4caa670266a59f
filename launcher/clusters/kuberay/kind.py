"""The kind `kuberay`: submits a run or sweep to Kubernetes as a RayJob."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    pull_secrets: list[str] = field(default_factory=list)  # Kubernetes secrets for the registry of the image
    tolerations: list[Any] = field(default_factory=list)  # of all pods, as Kubernetes defines them
    node_selector: dict[str, Any] = field(default_factory=dict)  # labels of the nodes for workers
    priority_class: str | None = None  # of all pods


_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_TOLERATION: dict[str, tuple[str, ...]] = {  # key -> its values, if they are limited
    "key": (),
    "operator": ("Equal", "Exists"),
    "value": (),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "tolerationSeconds": (),
}


class KubeRay(ClusterKind):
    name = "kuberay"
    config = KubeRayCluster
    is_batch = True
    is_rented = True
    makes_mounts = True

    def check(self, cluster: KubeRayCluster) -> None:
        names = [(key, getattr(cluster, key)) for key in ("namespace", "secret", "service_account", "priority_class")]
        for key, value in (*names, *(("pull_secrets", secret) for secret in cluster.pull_secrets)):
            if value is not None and not re.fullmatch(_NAME, str(value)):
                raise ConfigError(
                    f"cluster.{key} is {value!r}, but must be a Kubernetes name, such as my-name.", key=f"cluster.{key}"
                )
        for toleration in cluster.tolerations:
            _check_toleration(toleration)
        for label, value in cluster.node_selector.items():
            if isinstance(value, (Mapping, list)) or value is None:
                raise ConfigError(
                    f"cluster.node_selector: the value of {label} is {value!r}, but must be text, as in "
                    "cluster.node_selector={agentpool: gpu}.",
                    key="cluster.node_selector",
                )
        for key in ("image", "context"):
            value = getattr(cluster, key)
            if value is not None and (not value or value[0] == "-" or not value.isprintable() or " " in value):
                raise ConfigError(
                    f"cluster.{key} is {value!r}, but must be a name without spaces.", key=f"cluster.{key}"
                )

    def machines(self, cluster: ClusterConfig) -> Machines:
        raise ConfigError(
            "cluster=kuberay is set in a configuration file, but this command starts the workers itself. Set it on the "
            "command line to submit a RayJob: launch … cluster=kuberay."
        )

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> RayJob:
        from launcher.clusters.kuberay.ray_job import ray_job

        assert isinstance(cluster, KubeRayCluster)
        return ray_job(cluster, run, root, words, ask)


def _check_toleration(toleration: Any) -> None:
    example = "{key: team, operator: Equal, value: vision, effect: NoSchedule}"
    if not isinstance(toleration, Mapping) or not toleration:
        raise ConfigError(
            f"cluster.tolerations: {toleration!r} is not a toleration of Kubernetes, such as {example}.",
            key="cluster.tolerations",
        )
    for key, value in toleration.items():
        if key not in _TOLERATION:
            raise ConfigError(
                f"cluster.tolerations: {key} is not a key of a toleration. Use {', '.join(_TOLERATION)}, for example "
                f"{example}.",
                key="cluster.tolerations",
            )
        if _TOLERATION[key] and value not in _TOLERATION[key]:
            raise ConfigError(
                f"cluster.tolerations: {key} is {value!r}, but must be {' or '.join(_TOLERATION[key])}.",
                key="cluster.tolerations",
            )


KIND = KubeRay()
