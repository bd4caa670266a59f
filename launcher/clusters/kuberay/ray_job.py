"""The manifest of a run on Kubernetes: a RayJob, written for AKS. Sends no request to a cluster before `submit`.

KubeRay creates a Ray cluster of pods for the job, runs `launch train … cluster=existing` on its head, and removes the
Ray cluster after the command has exited (`shutdownAfterJobFinishes`). The fields are those of KubeRay v1.7.0,
`ray.io/v1`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from launcher.clusters.kuberay.kind import KubeRayCluster
from launcher.clusters.kuberay.kubectl import Kubectl
from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.clusters.pricing.rates import overrides as rate_overrides
from launcher.clusters.remote.mounts import Mount, read
from launcher.errors import ConfigError, TrainingError
from launcher.runs.storage import check_uri, is_gathered, is_uri

LONGEST_NAME = 47  # of a RayJob; KubeRay adds suffixes to it
USER = 10001  # the user id of the image; see the Dockerfile
# The share of a VM's memory for pods. AKS reserves up to a fifth of small VMs, and a part of one core.
_MEMORY_SHARE = 0.8
_SHM_SHARE = 0.3  # of the pod's memory, for Ray's object store and the data loaders
_COMMAND = "LAUNCH_COMMAND"
# Two shells, of the submitter and of the head, evaluate the entrypoint, so quoted arguments would be split. Therefore
# the command is passed in an environment variable, and the entrypoint contains nothing to quote but the pipe.
ENTRYPOINT = f"printenv {_COMMAND} \\| sh"


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
        return text(self)

    def facts(self) -> dict[str, Any]:
        """Return the manifests as plain data."""
        return {"manifests": manifests(self)}

    def submit(self, report: Callable[[str], None]) -> Callable[[], int]:
        """Create the RayJob. Returns a function that follows it and returns the exit status.

        Ctrl-C stops following; the RayJob keeps running.

        Raises:
            ClusterError: kubectl or the cluster rejected the request.
        """
        kubectl = Kubectl(self.cluster.context, self.cluster.namespace)
        context = kubectl.check()
        kubectl.create(text(self))
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
            "(`launch sizes` lists them)."
        )
    if cluster.image is None:
        raise ConfigError(
            "cluster=kuberay needs cluster.image=REGISTRY/NAME:TAG, the image of head and workers. Build it with the "
            "Dockerfile of launch, or derive your own image from that one with FROM and add your project."
        )
    mounts = tuple(read(cluster.mounts))
    _check_root(root, mounts)
    if cluster.env and cluster.secret is None:
        raise ConfigError(
            f"cluster.env=[{','.join(cluster.env)}] is read from a Kubernetes secret, but cluster.secret is not "
            "set. Set cluster.secret=NAME. To create the secret: kubectl create secret generic NAME "
            + " ".join(f'--from-literal={name}="${name}"' for name in cluster.env)
        )
    if cluster.min_nodes == 0:
        raise ConfigError("cluster.min_nodes=0: a RayJob needs at least one worker to start. Set cluster.min_nodes=1.")
    if (cluster.min_nodes or 1) > cluster.nodes:
        raise ConfigError(
            f"cluster.min_nodes={cluster.min_nodes} is more than cluster.nodes={cluster.nodes}. Lower it."
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
            "pods can write: cluster.mounts={/shared: claim://NAME} run.root=/shared/runs."
        )


# ---- the manifest ---------------------------------------------------------------------------------------------------


def manifests(job: RayJob) -> list[dict[str, Any]]:
    """Return the objects to create: volumes of Blob storage with their claims, then the RayJob."""
    volumes = [part for mount in job.mounts if mount.claim is None for part in _volume(job, mount)]
    return [*volumes, _ray_job(job)]


def text(job: RayJob) -> str:
    """Return the manifest as YAML."""
    documents = yaml.safe_dump_all(manifests(job), sort_keys=False, width=10_000)
    return f"# Written by launch for `kubectl create -f`.\n{documents}"


def _ray_job(job: RayJob) -> dict[str, Any]:
    cluster = job.cluster
    idle = round(cluster.idle_minutes * 60)
    workers = {
        "groupName": "gpu",
        "replicas": cluster.nodes,
        "minReplicas": cluster.nodes if cluster.min_nodes is None else cluster.min_nodes,
        "maxReplicas": cluster.nodes,
        "rayStartParams": {},
        "template": _template(job, "ray-worker"),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(job, job.name),
        "spec": {
            "entrypoint": ENTRYPOINT,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 0,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": idle},
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _template(job, "ray-head", head=True),
                },
                "workerGroupSpecs": [workers],
            },
        },
    }


def _metadata(job: RayJob, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": job.cluster.namespace,
        "labels": {"app.kubernetes.io/managed-by": "launch", "app.kubernetes.io/instance": job.name},
    }


def _template(job: RayJob, container: str, head: bool = False) -> dict[str, Any]:
    """Return the pod template of the head, or of a worker, which occupies a whole VM of the node pool."""
    cluster, vm = job.cluster, job.nodes.head if head else job.nodes.size
    memory = int(vm.memory_gib * _MEMORY_SHARE)
    resources: dict[str, Any] = {"cpu": str(vm.vcpus - 1), "memory": f"{memory}Gi"}
    if not head:
        resources["nvidia.com/gpu"] = str(job.nodes.size.devices)
    env: list[dict[str, Any]] = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": cluster.secret, "key": name}}} for name in cluster.env
    ]
    if head:
        env.append({"name": _COMMAND, "value": shlex.join(job.command).replace("$(", "$$(")})
    shm = {"medium": "Memory", "sizeLimit": f"{max(1, int(memory * _SHM_SHARE))}Gi"}
    claims = [(mount, mount.claim or f"{job.name}-{mount.slug}") for mount in job.mounts]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": cluster.image,
                **({"env": env} if env else {}),
                "resources": {"requests": resources, "limits": resources.copy()},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [
                    {"name": "shm", "mountPath": "/dev/shm"},
                    *(
                        {"name": mount.slug, "mountPath": mount.path, "readOnly": mount.claim is None}
                        for mount, _ in claims
                    ),
                ],
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": shm},
            *({"name": mount.slug, "persistentVolumeClaim": {"claimName": claim}} for mount, claim in claims),
        ],
        # The autoscaler on the head creates pods through the Kubernetes API. Workers need no access to it.
        **({} if head else {"automountServiceAccountToken": False, **_placement(job.nodes)}),
    }
    labels = {"app.kubernetes.io/managed-by": "launch"}
    if cluster.service_account is not None:
        spec["serviceAccountName"] = cluster.service_account
        labels["azure.workload.identity/use"] = "true"  # access to storage without a key
    return {"metadata": {"labels": labels}, "spec": spec}


def _placement(nodes: Nodes) -> dict[str, Any]:
    """Return the fields that place a pod on a VM of the size, and on a spot VM if spot is requested."""
    selector = {"node.kubernetes.io/instance-type": nodes.size.name}
    tolerations = [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}]
    spot = {**tolerations[0], "key": "kubernetes.azure.com/scalesetpriority", "value": "spot"}
    placed: dict[str, Any] = {"nodeSelector": selector, "tolerations": tolerations}
    if nodes.spot is not False:
        tolerations.append(spot)
    if nodes.spot is True:
        selector[spot["key"]] = spot["value"]
    elif nodes.spot == "prefer":
        expression = {"key": spot["key"], "operator": "In", "values": [spot["value"]]}
        term = {"weight": 100, "preference": {"matchExpressions": [expression]}}
        placed["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}
    return placed


def _volume(job: RayJob, mount: Mount) -> list[dict[str, Any]]:
    """Return a read-only volume of Blob storage and the claim that pods reference. The kubelet's identity accesses it.

    The attributes are those in `docs/driver-parameters.md` of kubernetes-sigs/blob-csi-driver. The cache is below /mnt
    of the node, which is its temporary disk.
    """
    name = f"{job.name}-{mount.slug}"
    below = [f"--subdirectory={mount.below}"] if mount.below else []
    size = {"storage": "1Ti"}  # required by Kubernetes, but without effect on a read-only volume
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {key: value for key, value in _metadata(job, name).items() if key != "namespace"},
        "spec": {
            "capacity": size,
            "accessModes": ["ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": job.cluster.namespace, "name": name},
            "mountOptions": ["-o ro", "-o allow_other", "--use-adls=true", "--file-cache-timeout=31536000", *below],
            "csi": {
                "driver": "blob.csi.azure.com",
                "readOnly": True,
                "volumeHandle": f"{mount.account}_{mount.container}_{name}",
                "volumeAttributes": {
                    "protocol": "fuse2",
                    "storageAccount": mount.account,
                    "containerName": mount.container,
                    "AzureStorageAuthType": "MSI",
                },
            },
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(job, name),
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": name,
            "resources": {"requests": size},
        },
    }
    return [volume, claim]
