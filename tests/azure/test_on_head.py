"""The watchdog on the head: when it requests nodes, releases the request, and deletes idle machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.clusters.azure import node_join, on_head
from launcher.clusters.azure.on_head import GRACE_SECONDS, HOLD_SECONDS, REQUEST_SECONDS, ClusterState, Watchdog

IDLE = 600.0


class Recorder:
    """A watchdog that records its actions."""

    def __init__(self, remove: bool = False, requested: int = 2) -> None:
        self.requested = requested
        self.actions: list[tuple[str, int]] = []
        self.watchdog = Watchdog(IDLE, remove, lambda action, count: self.actions.append((action, count)), now=0.0)

    def at(
        self,
        now: float,
        workers: int,
        busy: bool = False,
        requested: int | None = None,
        requested_at: float = 1.0,
        budget_spent: bool = False,
    ) -> list[tuple[str, int]]:
        self.actions.clear()
        self.watchdog.step(
            ClusterState(workers, busy),
            self.requested if requested is None else requested,
            requested_at,
            now,
            budget_spent,
        )
        return list(self.actions)


def test_the_request_is_released_after_the_nodes_have_joined() -> None:
    """An active request keeps idle nodes forever."""
    recorder = Recorder()
    assert recorder.at(5, workers=0) == [("request", 2)]
    assert recorder.at(10, workers=1) == [("request", 2)]
    assert recorder.at(15, workers=2) == [("request", 2)], "held until the run starts"
    assert recorder.at(15 + HOLD_SECONDS, workers=2) == [("release", 0)]
    assert recorder.at(20 + HOLD_SECONDS, workers=2) == []
    assert recorder.at(30 + HOLD_SECONDS, workers=1) == [], "a node was evicted, and no command waits for it"


def test_idle_nodes_are_held_for_a_new_run() -> None:
    """Ray would delete them between `up` and the first task of the run."""
    recorder = Recorder()
    recorder.at(15, workers=2)
    recorder.at(15 + HOLD_SECONDS, workers=2)
    late = 15 + IDLE
    assert recorder.at(late + 1, workers=2, requested_at=late) == [("request", 2)]
    assert recorder.at(late + 1 + IDLE + GRACE_SECONDS, workers=2, requested_at=late) == [("release", 0)]


def test_a_request_for_no_nodes_holds_none() -> None:
    """With cluster.min_nodes=0 no GPU VM is created before a job needs one."""
    recorder = Recorder()
    assert recorder.at(5, workers=0, requested=0) == []
    assert recorder.at(10, workers=1, requested=0, busy=True) == []


def test_nodes_are_deleted_if_ray_is_dead_on_the_head() -> None:
    """Nothing runs on them, and only the watchdog is left to delete them."""
    recorder = Recorder()
    assert recorder.at(5, workers=0) == [("request", 2)]
    recorder.actions.clear()
    for now, expected in ((10.0, []), (5 + IDLE + GRACE_SECONDS, []), (6 + IDLE + GRACE_SECONDS, [("workers", 1)])):
        recorder.actions.clear()
        recorder.watchdog.step(ClusterState(1, busy=False, alive=False), 2, 1.0, now)
        assert recorder.actions == expected


def test_a_request_waits_until_deletions_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `up` would count machines that are being deleted, and a run would start on them."""
    monkeypatch.setattr(on_head, "REQUESTED", tmp_path / "requested")
    monkeypatch.setattr(on_head, "LOCK", tmp_path / "requested.lock")
    monkeypatch.setattr(on_head, "SPENT", tmp_path / "spent")
    monkeypatch.setattr(on_head, "_observe", lambda: ClusterState(1, busy=False))
    on_head.REQUESTED.write_text("0")
    os.utime(on_head.REQUESTED, (1.0, 1.0))
    request: list[subprocess.Popen[str]] = []

    def act(action: str, count: int) -> None:
        assert action == "workers"
        command = node_join.request_line(2).replace(node_join.DIRECTORY, str(tmp_path))
        request.append(subprocess.Popen(["sh", "-c", command], text=True))
        with pytest.raises(subprocess.TimeoutExpired):
            request[0].wait(0.3)
        assert on_head.REQUESTED.read_text() == "0"

    with on_head._exclusive():
        on_head.step(Watchdog(IDLE, False, act, now=0.0))
    assert request[0].wait(240) == 0
    assert on_head.REQUESTED.read_text() == "2\n"


def test_a_request_has_a_time_limit() -> None:
    """Without capacity the watchdog does not retry forever, and a new request restarts the time limit."""
    recorder = Recorder()
    recorder.at(5, workers=0)
    assert recorder.at(REQUEST_SECONDS + 1, workers=0) == [("release", 0)]
    assert recorder.at(REQUEST_SECONDS + 10, workers=0) == []
    assert recorder.at(REQUEST_SECONDS + 20, workers=0, requested_at=REQUEST_SECONDS + 15) == [("request", 2)]


def test_idle_nodes_that_ray_does_not_delete_are_deleted() -> None:
    recorder = Recorder()
    recorder.at(15, workers=2)
    assert recorder.at(15 + HOLD_SECONDS, workers=2) == [("release", 0)]
    assert recorder.at(15 + IDLE + GRACE_SECONDS - 20, workers=2) == []
    assert recorder.at(15 + IDLE + GRACE_SECONDS + 5, workers=2) == [("workers", 2)]


def test_busy_nodes_are_never_deleted() -> None:
    recorder = Recorder(remove=True, requested=0)
    for now in range(15, 10_000, 100):
        assert recorder.at(now, workers=2, busy=True) == []
    assert recorder.at(10_000 + IDLE - 200, workers=2) == []


def test_the_group_is_deleted_only_on_request() -> None:
    recorder = Recorder(remove=True, requested=0)
    recorder.at(15, workers=2, busy=True)
    assert recorder.at(15 + IDLE - 5, workers=0) == []
    assert recorder.at(15 + IDLE + 5, workers=0) == [("group", 0)]
    assert Recorder(remove=False).at(15 + IDLE + 5, workers=0, requested=0) == []


def test_idle_nodes_are_deleted_immediately_if_a_budget_is_spent() -> None:
    recorder = Recorder(requested=0)
    recorder.at(15, workers=2, busy=True)
    assert recorder.at(20, workers=2, busy=True, budget_spent=True) == [], "another run is active"
    assert recorder.at(25, workers=2, budget_spent=True) == [("workers", 2)]
    assert recorder.at(30, workers=0, budget_spent=True) == []


def test_a_spent_budget_releases_the_request() -> None:
    recorder = Recorder()
    assert recorder.at(5, workers=1) == [("request", 2)]
    assert recorder.at(10, workers=1, budget_spent=True) == [("release", 0), ("workers", 1)]


def test_errors_of_the_autoscaler_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the only record of why nodes are not created. Messages of ssh are left out."""
    monkeypatch.setattr(on_head, "LOGS", tmp_path)
    monkeypatch.setattr(on_head, "ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("LAUNCH_FAILURES", str(tmp_path / "failures"))
    complaint = "ERROR azure: the policy 'no-gpu' forbids it"
    chatter = ["Warning: Permanently added '10.77.0.5' (ED25519)", "Shared connection to 10.77.0.5 closed.", ""]
    (tmp_path / "monitor.err").write_text("\n".join([*chatter, complaint, *chatter]))
    found = on_head.report()
    assert found["monitor_err"] == complaint
    assert found["nodes"] == []
    assert "127.0.0.1:9" in found["why_none"]
    assert complaint in node_join.complaint(found)
