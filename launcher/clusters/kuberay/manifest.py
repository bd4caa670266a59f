"""The Kubernetes manifest of a RayJob: the RayJob itself and the volumes of Blob storage that its pods mount.

The fields are those of KubeRay v1.7.0, `ray.io/v1`.
"""

from __future__ import annotations

import copy
import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from launcher.clusters.kuberay.kind import KubeRayCluster
from launcher.clusters.pricing.nodes import Nodes
from launcher.clusters.remote.mounts import Mount

if TYPE_CHECKING:
    from launcher.clusters.kuberay.ray_job import RayJob

USER = 10001  # the user id of the image; see the Dockerfile
# The share of a VM's memory for pods. AKS reserves up to a fifth of small VMs, and a part of one core.
_MEMORY_SHARE = 0.8
_SHM_SHARE = 0.3  # of the pod's memory, for Ray's object store and the data loaders
_COMMAND = "LAUNCH_COMMAND"
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
# Two shells, of the submitter and of the head, evaluate the entrypoint, so quoted arguments would be split. Therefore
# the command is passed in an environment variable, and the entrypoint contains nothing to quote but the pipe.
ENTRYPOINT = f"printenv {_COMMAND} \\| sh"


def manifests(job: RayJob) -> list[dict[str, Any]]:
    """Return the objects to create: volumes of Blob storage with their claims, then the RayJob."""
    volumes = [part for mount in job.mounts if mount.claim is None for part in _volume(job, mount)]
    return [*volumes, _ray_job(job)]


def text(job: RayJob) -> str:
    """Return the manifest as YAML."""
    documents = yaml.safe_dump_all(manifests(job), sort_keys=False, width=10_000)
    notes = "".join(f"# Warning: {warning}\n" for warning in job.warnings())
    return f"# Written by launch for `kubectl create -f`.\n{notes}{documents}"


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
            **_submitter(job.cluster),
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


def _submitter(cluster: KubeRayCluster) -> dict[str, Any]:
    """Return the template of the pod that submits the job, if it needs settings that KubeRay's default lacks.

    Without a command in the template, KubeRay adds that of the submission.
    """
    settings = _pod_settings(cluster)
    if not settings:
        return {}
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": copy.deepcopy(_CONTAINER_SECURITY),
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": copy.deepcopy(_POD_SECURITY),
        "containers": [container],
        **settings,
    }
    return {"submitterPodTemplate": {"spec": spec}}


def _pod_settings(cluster: KubeRayCluster) -> dict[str, Any]:
    """Return the fields of a pod that the configuration sets for all pods."""
    settings: dict[str, Any] = {}
    if cluster.pull_secrets:
        settings["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    if cluster.priority_class is not None:
        settings["priorityClassName"] = cluster.priority_class
    if cluster.tolerations:
        settings["tolerations"] = [dict(toleration) for toleration in cluster.tolerations]
    return settings


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
        "securityContext": copy.deepcopy(_POD_SECURITY),
        "containers": [
            {
                "name": container,
                "image": cluster.image,
                **({"env": env} if env else {}),
                "resources": {"requests": resources, "limits": resources.copy()},
                "securityContext": copy.deepcopy(_CONTAINER_SECURITY),
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
    settings = _pod_settings(cluster)
    settings["tolerations"] = [*spec.get("tolerations", ()), *settings.get("tolerations", ())]
    spec |= {key: value for key, value in settings.items() if value}
    if not head:
        spec["nodeSelector"] |= {label: _label(value) for label, value in cluster.node_selector.items()}
    labels = {"app.kubernetes.io/managed-by": "launch"}
    if cluster.service_account is not None:
        spec["serviceAccountName"] = cluster.service_account
        labels["azure.workload.identity/use"] = "true"  # access to storage without a key
    return {"metadata": {"labels": labels}, "spec": spec}


def _label(value: Any) -> str:
    """Return the value of a label as text: YAML reads `true` and `1` as other types, and Kubernetes rejects those."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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
