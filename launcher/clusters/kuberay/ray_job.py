"""A run as a RayJob on Kubernetes, for example AKS. Sends no request to a cluster before `submit`.

KubeRay creates a Ray cluster of pods for the job, runs `launch train … cluster=existing` on its head, and removes the
Ray cluster after the command has exited (`shutdownAfterJobFinishes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.clusters.kuberay import manifest
from launcher.clusters.kuberay.kind import KubeRayCluster
from launcher.clusters.kuberay.kubectl import Kubectl
from launcher.clusters.pricing.catalogue import as_of
from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.clusters.pricing.rates import overrides as rate_overrides
from launcher.clusters.remote.mounts import Mount, read
from launcher.errors import ConfigError, TrainingError
from launcher.runs.storage import check_uri, is_gathered, is_uri

LONGEST_NAME = 47  # of a RayJob; KubeRay adds suffixes to it


@dataclass(frozen=True)
class RayJob:
    """The request to run a job on Kubernetes.

    Attributes:
        name: the name of the RayJob.
        run, root: run.name and run.root.
        nodes: the sizes of the VMs for workers and head.
        cluster: the configuration of the cluster.
        mounts: the volumes of `cluster.mounts`.
        command: the arguments of the command on the head.
    """

    name: str
    run: str
    root: str
    nodes: Nodes
    cluster: KubeRayCluster
    mounts: tuple[Mount, ...]
    command: tuple[str, ...]

    @property
    def directory(self) -> str:
        """Return the run directory, a path or a URI."""
        return f"{self.root.rstrip('/')}/{self.run}"

    def text(self) -> str:
        """Return the manifest as YAML."""
        return manifest.text(self)

    def facts(self) -> dict[str, Any]:
        """Return the manifests as plain data, and warnings."""
        return {"manifests": manifest.manifests(self), "notes": self.warnings()}

    def warnings(self) -> list[str]:
        """Return facts that may prevent the pods from running, one sentence each."""
        size, notes = self.nodes.size, []
        if not size.aks:
            notes.append(
                f"AKS does not support node pools of {size.name} (catalogue of {as_of()}), so the pods may never be "
                "scheduled. Choose another cluster.size, unless your cluster is not AKS."
            )
        if size.driver is not None:
            notes.append(f"The node pool of {size.name} needs the NVIDIA {size.driver} driver.")
        return notes

    def submit(self, report: Callable[[str], None]) -> Callable[[], int]:
        """Create the RayJob. Returns a function that follows it and returns the exit status.

        Ctrl-C stops following; the RayJob keeps running.

        Raises:
            ClusterError: kubectl or the cluster rejected the request.
        """
        kubectl = Kubectl(self.cluster.context, self.cluster.namespace)
        context = kubectl.check()
        for warning in self.warnings():
            report(f"Warning: {warning}")
        kubectl.create(self.text())
        report(f"{self.run}: RayJob {self.name} on {context}, {self.cluster.nodes} x {self.nodes.size.name}")
        return lambda: self._follow(kubectl, report)

    def _follow(self, kubectl: Kubectl, report: Callable[[str], None]) -> int:
        how = f"Follow it with: kubectl --namespace {self.cluster.namespace} logs -f job/{self.name}"
        stop = f"stop it with: launch stop {self.run} run.root={self.root}"
        if self.cluster.detach:
            report(f"{how}; {stop}")
            return 0
        try:
            status = kubectl.follow(self.name, report)
        except KeyboardInterrupt:
            report(f"The RayJob keeps running. {how}; {stop}")
            return 130
        if status.get("jobStatus") == "SUCCEEDED":
            return 0
        why = str(status.get("message") or status.get("reason") or status.get("jobStatus") or "no reason given").strip()
        raise TrainingError(
            f"The RayJob {self.name} failed: {why.splitlines()[-1].rstrip('.')}. Its log: kubectl --namespace "
            f"{self.cluster.namespace} logs job/{self.name}; events of its pods: kubectl describe rayjob {self.name}."
        )


def ray_job(cluster: KubeRayCluster, run: str, root: str, words: Sequence[str], ask: bool = True) -> RayJob:
    """Validate the configuration and return the request.

    Args:
        run, root: run.name and run.root.
        words: the arguments of the command, without those of `cluster` and `run`.
        ask: whether to query Azure's public price list for today's prices, with which the run computes its cost.

    Raises:
        ConfigError: the size or image is missing, the pods do not share the run root, a mount is invalid, and others.
    """
    if cluster.size is None:
        raise ConfigError(
            "cluster=kuberay needs cluster.size=SIZE, the VM size of the node pool, such as Standard_NC24ads_A100_v4 "
            "(`launch sizes` lists them).",
            key="cluster.size",
        )
    if cluster.image is None:
        raise ConfigError(
            "cluster=kuberay needs cluster.image=REGISTRY/NAME:TAG, the image of head and workers. Build it with the "
            "Dockerfile of launch, or derive your own image from that one with FROM and add your project.",
            key="cluster.image",
        )
    mounts = tuple(read(cluster.mounts))
    _check_root(root, mounts)
    if cluster.env and cluster.secret is None:
        raise ConfigError(
            f"cluster.env=[{','.join(cluster.env)}] is read from a Kubernetes secret, but cluster.secret is not "
            "set. Set cluster.secret=NAME. To create the secret: kubectl create secret generic NAME "
            + " ".join(f'--from-literal={name}="${name}"' for name in cluster.env),
            key="cluster.secret",
        )
    if cluster.min_nodes == 0:
        raise ConfigError(
            "cluster.min_nodes=0: a RayJob needs at least one worker to start. Set cluster.min_nodes=1.",
            key="cluster.min_nodes",
        )
    if (cluster.min_nodes or 1) > cluster.nodes:
        raise ConfigError(
            f"cluster.min_nodes={cluster.min_nodes} is more than cluster.nodes={cluster.nodes}. Lower it.",
            key="cluster.min_nodes",
        )
    nodes = nodes_for(cluster, ask)
    costs = rate_overrides(cluster, nodes=nodes)
    if cluster.budget_usd is not None:
        costs.append(f"cluster.budget_usd={cluster.budget_usd:g}")
    command = ("launch", "train", *words, f"run.name={run}", f"run.root={root}", "cluster=existing", *costs)
    return RayJob(name_of(run), run, root, nodes, cluster, mounts, command)


def name_of(run: str) -> str:
    """Return the name of a run's RayJob: lowercase letters, digits and hyphens, starting with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:LONGEST_NAME].rstrip("-")


def _check_root(root: str, mounts: Sequence[Mount]) -> None:
    if is_uri(root) and not is_gathered(root):
        check_uri(root)
        return
    claims = [mount.path for mount in mounts if mount.claim is not None]
    if not any(f"{root.rstrip('/')}/".startswith(f"{path}/") for path in claims):
        raise ConfigError(
            f"run.root={root} is a directory in a pod and would be deleted with it. Use an object store, such as "
            "run.root=abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/runs, or a directory of a volume claim that all "
            "pods can write: cluster.mounts={/shared: claim://NAME} run.root=/shared/runs.",
            key="run.root",
        )
