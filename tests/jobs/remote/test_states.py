"""The states of remote runs in `launch runs`, `logs` and `stop`."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.cli.listing import rows
from launcher.clusters.remote import registry
from launcher.clusters.remote.ray_jobs import Unreachable
from launcher.clusters.remote.registry import Head
from launcher.errors import HostError
from launcher.jobs.remote import states
from launcher.jobs.remote.location import RunLocation
from launcher.jobs.remote.states import Waiting, states_of
from launcher.runs import RunDirectory

CLUSTER = "pair"


class Cluster:
    """A head with the files below `disk`, and a Ray with `jobs`. `fault` is the failure to simulate."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.jobs, self.fault = disk, {}, ""  # type: tuple[Path, dict[str, str], str]
        self.asked = 0

    def look(self, head: Head, directories: list[str]) -> tuple[list[dict[str, Any]], bool]:
        self.asked += 1
        if self.fault == "silent":
            threading.Event().wait(60)
        if self.fault == "off":
            raise HostError("vm1 does not answer (timed out).", "vm1", "dead")
        found = [Path(directory, "result.json") for directory in directories]
        return [json.loads(path.read_text()) if path.exists() else {} for path in found], self.fault != "rebooted"

    @contextmanager
    def through(self, head: Head) -> Iterator[Any]:
        yield self

    def status(self, job: str) -> str:
        if self.fault == "drops":
            raise Unreachable("connection reset.")
        return self.jobs.get(job, "GONE")

    def send(self, root: Path, name: str, job: str, result: dict[str, Any] | None = None) -> RunDirectory:
        """Return a remote run without local files."""
        run = RunDirectory(root / name)
        run.create()
        there = self.disk / name
        there.mkdir(parents=True)
        if result is not None:
            (there / "result.json").write_text(json.dumps(result))
        RunLocation(f"job-{name}", head=CLUSTER, directory=str(there)).write(run)
        self.jobs[f"job-{name}"] = job
        return run


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    registry.save(Head(CLUSTER, "ssh", ["ssh", "vm1"], "python3", "vm1:6379", 8265, "/there"))
    made = Cluster(tmp_path / "head")
    monkeypatch.setattr(states, "_look", made.look)
    monkeypatch.setattr(states, "through", made.through)
    return made


RUNNING = {"status": "running", "steps": 50}
TABLE = [
    ("queued", "PENDING", None),
    ("starting", "RUNNING", None),
    ("starting", "RUNNING", {"status": "running", "steps": 0}),
    ("working", "RUNNING", RUNNING),
    ("working", "RUNNING", {"status": "running"}),  # a sweep
    ("completed", "SUCCEEDED", {"status": "completed", "steps": 100}),
    ("stopped", "SUCCEEDED", {"status": "stopped", "steps": 60}),
    ("failed", "FAILED", None),
    ("stopped", "STOPPED", None),
    ("lost", "FAILED", RUNNING),
    ("lost", "SUCCEEDED", RUNNING),
]


def test_the_state_of_each_combination_of_job_and_result(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for number, (_, job, result) in enumerate(TABLE):
        cluster.send(root, f"r{number:02}", job, result)
    found = rows(root)
    assert [row["status"] for row in found] == [word for word, _, _ in TABLE]
    assert cluster.asked == 1, "one connection per cluster, for all of its runs"
    (lost, _) = [row for row in found if row["status"] == "lost"]
    assert re.search(r"\b50\b.*run\.name=r09 run\.resume=true", lost["error"])


@pytest.mark.parametrize(
    ("fault", "word"),
    [("off", "unreachable"), ("drops", "unreachable"), ("silent", "unreachable"), ("rebooted", "lost")],
)
def test_a_cluster_with_a_fault(cluster: Cluster, tmp_path: Path, fault: str, word: str) -> None:
    run = cluster.send(tmp_path / "runs", "a", "RUNNING", RUNNING)
    done = cluster.send(tmp_path / "runs", "b", "SUCCEEDED", {"status": "completed", "steps": 9})
    cluster.fault = fault
    found = states_of([run, done], patience=0.5)
    assert found[run.path].word == word
    assert found[done.path].word == ("completed" if fault == "rebooted" else word)
    assert found[run.path].reason


def test_a_run_is_lost_with_its_head(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.send(tmp_path / "runs", "a", "RUNNING", RUNNING)
    cluster.jobs.clear()
    assert states_of([run])[run.path].word == "lost"
    registry.forget(CLUSTER)
    assert states_of([run])[run.path].word == "lost"


def test_the_cluster_of_an_unconfirmed_run_is_not_contacted(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "theirs")
    run.create()
    (run.path / "remote.json").write_text(json.dumps({"job": "x", "head": CLUSTER, "directory": "/there/x"}))
    assert [row["status"] for row in rows(tmp_path / "runs")] == ["sent"]
    assert cluster.asked == 0


def test_stop_of_a_lost_run_names_the_command_to_continue(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.jobs.remote.control.fetch_files", lambda run: None)
    cluster.send(tmp_path / "runs", "a", "RUNNING", RUNNING)
    cluster.fault = "rebooted"
    assert cli.run(["stop", "a", f"run.root={tmp_path / 'runs'}"]) == 2
    message = capsys.readouterr().err
    assert re.search(r'"a" .*\bRay\b.* pair\..* 50;.*launch run\.name=a run\.resume=true', message)


def test_logs_report_the_state_and_end_with_the_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cluster.send(tmp_path / "runs", "a", "PENDING")
    notes: list[str] = []
    waiting = Waiting(run, notes.append, seconds=0.0)
    monkeypatch.setattr(states, "ASK_SECONDS", 0.0)
    changes: list[tuple[str, str, bool]] = [
        ("PENDING", "", True),
        ("RUNNING", "", True),
        ("RUNNING", "", True),
        ("RUNNING", "rebooted", False),
    ]
    for job, fault, active in changes:
        cluster.jobs["job-a"], cluster.fault = job, fault
        assert waiting() is active
    assert [note.partition(".")[0] for note in notes] == ["a is queued", "a is starting", "a is lost"]
    assert not waiting()
    cluster.fault = "off"
    assert not Waiting(run, notes.append, seconds=0.0)(), "it waits for ever for an unreachable cluster"
    assert Waiting(run, notes.append)()
