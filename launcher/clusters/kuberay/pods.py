"""Explain why the pods of a RayJob do not start: the image, the scheduler, a quota, a secret or a volume."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launcher.errors import ClusterError

PATIENCE_SECONDS = 30.0  # starting pods takes this long without a problem
_INTERVAL_SECONDS = 10.0  # between two queries
_STARTING = ("ContainerCreating", "PodInitializing", "")  # reasons of a container that is starting normally
_EVENTS = ("FailedCreate", "FailedMount", "FailedAttachVolume", "FailedToCreateHeadPod", "FailedToCreateWorkerPod")

# Pattern of "reason: message" -> remedy. The first match counts.
_REMEDIES = (
    (
        r"^(ErrImage|ImagePull|InvalidImageName|ImageInspectError|RegistryUnavailable)",
        "Check cluster.image. For a private registry set cluster.pull_secrets=[NAME], or attach it with az aks update "
        "--attach-acr NAME",
    ),
    (r"^CreateContainerConfigError", "Check that the secret in cluster.secret exists and has the keys in cluster.env"),
    (r"exceeded quota", "Lower cluster.nodes, or ask for a larger ResourceQuota in cluster.namespace"),
    (r"PriorityClass", "Check cluster.priority_class; kubectl get priorityclasses lists the classes"),
    (r"^Failed(Mount|AttachVolume)", "Check cluster.mounts, and that the identity of the nodes may read the storage"),
    (
        r"untolerated taint(?!.*(Insufficient|didn't match))",
        "Add the taint of the node pool to cluster.tolerations",
    ),
    (
        r"^Unschedulable",
        "Check that a node pool of cluster.size exists whose labels, taints, autoscaler limit and quota allow the pod "
        "(cluster.node_selector, cluster.tolerations); an autoscaler may need minutes to add a node",
    ),
)


class StartupCheck:
    """Reports why the pods of a RayJob do not start, each reason once, after PATIENCE_SECONDS.

    Args:
        pods: returns the pods of a RayCluster, as Kubernetes describes them.
        warnings: returns the events of type Warning in the namespace.
        report: called with each line for the user.
    """

    def __init__(
        self,
        pods: Callable[[str], Sequence[Mapping[str, Any]]],
        warnings: Callable[[], Sequence[Mapping[str, Any]]],
        report: Callable[[str], None],
    ) -> None:
        self._pods, self._warnings, self._report = pods, warnings, report
        self._due = time.monotonic() + PATIENCE_SECONDS
        self._reported: set[str] = set()

    def check(self, name: str, status: Mapping[str, Any]) -> None:
        """Query the pods if it is due, and report new reasons. status: of the RayJob with this name."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _INTERVAL_SECONDS
        ray_cluster = str(status.get("rayClusterName") or "")
        if not ray_cluster:
            self._once(
                f"{name} is not started: KubeRay has not created a RayCluster for it. Check that the operator runs: "
                "kubectl get pods --all-namespaces -l app.kubernetes.io/name=kuberay-operator"
            )
            return
        try:
            pods = self._pods(ray_cluster)
            reasons = [*pod_reasons(pods), *event_reasons(self._warnings(), ray_cluster)]
        except ClusterError as error:  # an account may be allowed to create RayJobs, but not to list pods
            self._once(f"The pods of {name} cannot be examined: {error}")
            return
        for reason in reasons:
            self._once(reason)

    def _once(self, line: str) -> None:
        # Names of recreated pods and counts of nodes change, but not the reason.
        key = re.sub(r"\d+|-\w{5}\b", "", line)
        if key not in self._reported:
            self._reported.add(key)
            self._report(line)


def pod_reasons(pods: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one sentence for each pod that does not start, with cause and remedy."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                reason = str(condition.get("reason") or "Unschedulable")
                yield _sentence(f"Pod {name} is not scheduled", reason, str(condition.get("message") or ""))
        for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
            state = container.get("state") or {}
            waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
            if (reason := str(waiting.get("reason") or "")) not in _STARTING:
                yield _sentence(f"Pod {name} does not start", reason, str(waiting.get("message") or ""))
            elif ended.get("exitCode"):
                cause = str(ended.get("reason") or "Error")
                message = str(ended.get("message") or f"exit status {ended['exitCode']}; see kubectl logs {name}")
                yield _sentence(f"Pod {name} failed", cause, message)


def event_reasons(events: Sequence[Mapping[str, Any]], ray_cluster: str) -> Iterator[str]:
    """Yield one sentence for each warning that prevents pods of a RayCluster from being created or started."""
    for event in events:
        target = event.get("involvedObject") or {}
        if event.get("reason") in _EVENTS and str(target.get("name") or "").startswith(ray_cluster):
            what = f"{target.get('kind', 'Object')} {target['name']} does not start"
            yield _sentence(what, str(event["reason"]), str(event.get("message") or ""))


def _sentence(what: str, reason: str, message: str) -> str:
    cause = f"{reason}: {' '.join(message.split())[:500]}".rstrip(" .:")
    remedy = next((f" {remedy}." for pattern, remedy in _REMEDIES if re.search(pattern, cause)), "")
    return f"{what} ({cause}).{remedy}"
