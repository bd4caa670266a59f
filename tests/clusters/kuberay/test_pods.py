"""Why the pods of a RayJob do not start: causes and remedies, reported once and only after a while."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.clusters.kuberay import pods as pods_module
from launcher.clusters.kuberay.pods import StartupCheck, event_reasons, pod_reasons
from launcher.errors import ClusterError


def waiting(reason: str, message: str = "", name: str = "a1-head-x7k2p") -> dict[str, Any]:
    """Return a pod whose container waits for this reason."""
    state = {"waiting": {"reason": reason, "message": message}}
    return {"metadata": {"name": name}, "status": {"phase": "Pending", "containerStatuses": [{"state": state}]}}


def unscheduled(message: str, name: str = "a1-gpu-worker-b6m4q") -> dict[str, Any]:
    """Return a pod that the scheduler cannot place."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"metadata": {"name": name}, "status": {"phase": "Pending", "conditions": [condition]}}


def event(reason: str, message: str, name: str = "a1-raycluster-9xk2d") -> dict[str, Any]:
    return {"reason": reason, "message": message, "involvedObject": {"kind": "RayCluster", "name": name}}


@pytest.mark.parametrize(
    ("pod", "parts"),
    [
        (
            waiting("ImagePullBackOff", 'Back-off pulling image "launch:1"'),
            ["a1-head-x7k2p", 'image "launch:1"', "cluster.image", "cluster.pull_secrets"],
        ),
        (waiting("InvalidImageName"), ["cluster.image"]),
        (waiting("CreateContainerConfigError", 'secret "tokens" not found'), ['"tokens" not found', "cluster.secret"]),
        (
            unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            ["3 Insufficient nvidia.com/gpu", "cluster.size"],
        ),
        (
            unscheduled("0/2 nodes are available: 2 node(s) had untolerated taint {team: vision}."),
            ["{team: vision}", "cluster.tolerations"],
        ),
        (
            unscheduled("0/2 nodes are available: 1 node(s) had untolerated taint {x: y}, 1 Insufficient cpu."),
            ["cluster.size", "cluster.tolerations"],
        ),
        (waiting("SomethingNew", "a message"), ["SomethingNew: a message"]),
    ],
)
def test_a_pod_is_explained_with_a_remedy(pod: dict[str, Any], parts: list[str]) -> None:
    (line,) = pod_reasons([pod])
    assert [part for part in parts if part not in line] == []


def test_pods_that_start_normally_have_no_reason() -> None:
    running = {"metadata": {"name": "a1"}, "status": {"containerStatuses": [{"state": {"running": {}}}]}}
    assert list(pod_reasons([waiting("ContainerCreating"), running, {"metadata": {"name": "new"}}])) == []


def test_a_failed_container_is_reported() -> None:
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod = {"metadata": {"name": "a1-head"}, "status": {"containerStatuses": [{"state": state}]}}
    (line,) = pod_reasons([pod])
    assert "OOMKilled" in line
    assert "137" in line


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (event("FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus, requested: 4'), ["cluster.nodes"]),
        (event("FailedCreate", "no PriorityClass with name high was found"), ["cluster.priority_class"]),
        (event("FailedMount", "MountVolume.SetUp failed"), ["cluster.mounts"]),
        (event("FailedCreate", "of another run", name="b2-raycluster-1"), None),
        (event("Unhealthy", "Readiness probe failed"), None),
    ],
)
def test_events_of_the_cluster_are_explained(found: dict[str, Any], parts: list[str] | None) -> None:
    lines = list(event_reasons([found], "a1-raycluster-9xk2d"))
    assert len(lines) == (parts is not None)
    assert all(part in lines[0] for part in parts or ())


class Clock:
    """A replacement of `time.monotonic`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pods_module, "time", made)
    return made


STATUS = {"jobDeploymentStatus": "Initializing", "rayClusterName": "a1-raycluster-9xk2d"}


def test_reasons_are_reported_once_after_thirty_seconds(clock: Clock) -> None:
    """A recreated pod with the same reason is not reported again, but a new reason is."""
    lines: list[str] = []
    pods = [waiting("ErrImagePull", "denied")]
    check = StartupCheck(lambda name: pods, lambda: [], lines.append)
    for _ in range(30):
        clock.now += 1.0
        if clock.now < 130.0:
            check.check("a1", STATUS)
            assert lines == []
    check.check("a1", STATUS)
    assert len(lines) == 1
    pods[:] = [waiting("ErrImagePull", "denied", name="a1-head-q8z3w")]
    clock.now += 60.0
    check.check("a1", STATUS)
    assert len(lines) == 1
    pods[:] = [unscheduled("0/3 nodes are available")]
    clock.now += 60.0
    check.check("a1", STATUS)
    assert len(lines) == 2


def test_a_missing_operator_is_reported(clock: Clock) -> None:
    lines: list[str] = []
    check = StartupCheck(lambda name: [], lambda: [], lines.append)
    for _ in range(3):
        clock.now += 31.0
        check.check("a1", {})
    (line,) = lines
    assert "operator" in line


def test_pods_that_may_not_be_listed_do_not_end_following(clock: Clock) -> None:
    def forbidden(name: str) -> list[dict[str, Any]]:
        raise ClusterError("Listing the pods failed: forbidden.")

    lines: list[str] = []
    check = StartupCheck(forbidden, lambda: [], lines.append)
    for _ in range(3):
        clock.now += 31.0
        check.check("a1", STATUS)
    assert len(lines) == 1
