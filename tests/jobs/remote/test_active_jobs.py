"""`launch down` with an active run: the run is named, saved (`--save`) or killed (`--force`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.clusters import base
from launcher.clusters.remote import registry
from launcher.clusters.remote.ray_jobs import Unreachable
from launcher.clusters.remote.registry import Head
from launcher.jobs.remote import active_jobs
from launcher.jobs.remote.location import RunLocation
from launcher.runs import RunDirectory


class Cluster:
    """A cluster that records the calls."""

    def __init__(self) -> None:
        self.open = ["job-k1"]
        self.exiting: list[str] = []  # they exit after the next question
        self.done: list[str] = []
        self.answers = True

    @contextmanager
    def through(self, head: Head) -> Iterator[Any]:
        yield self

    def unfinished(self) -> list[str]:
        if not self.answers:
            raise Unreachable("connection refused.")
        asked = list(self.open)
        self.open = [job for job in self.open if job not in self.exiting]
        return asked

    def remove(self, name: str, tell: Callable[[str], None]) -> None:
        self.done.append(f"removed {name}")

    def stop(self, run: RunDirectory) -> str:
        self.done.append(f"saved {run.name}")
        return f"{run.name} is stopped at step 5."


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    registry.save(Head("pair", "ssh", ["ssh", "vm1"], "python3", "vm1:6379", 8265, "/there"))
    for name in ("k1", "ended"):
        run = RunDirectory(tmp_path / "runs" / name)
        run.create()
        RunLocation(f"job-{name}", head="pair", directory=f"/there/{name}").write(run)
    made = Cluster()
    monkeypatch.setattr(active_jobs, "through", made.through)
    monkeypatch.setattr(active_jobs.control, "stop", made.stop)
    monkeypatch.setattr(type(base.named("ssh")), "remove", lambda self, name, tell: made.remove(name, tell))
    return made


def test_down_names_an_active_run_and_keeps_its_cluster(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["down", "pair"]) == 2
    message = capsys.readouterr().err
    assert cluster.done == []
    assert '"k1" ' in message
    assert '"ended"' not in message
    assert "pair --save" in message
    assert "pair --force" in message


def test_a_run_that_has_ended_is_not_active_while_its_driver_exits(cluster: Cluster, tmp_path: Path) -> None:
    """`launch … && launch down` must not be rejected."""
    RunDirectory(tmp_path / "runs" / "k1").update_result(status="completed")
    cluster.exiting = ["job-k1"]
    assert cli.run(["down", "pair"]) == 0
    assert cluster.done == ["removed pair"]


def test_a_run_that_has_ended_here_and_was_resumed_is_active(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_jobs, "EXIT_SECONDS", 0.0)
    RunDirectory(tmp_path / "runs" / "k1").update_result(status="stopped")
    assert cli.run(["down", "pair"]) == 2
    assert cluster.done == []


@pytest.mark.parametrize(
    ("flags", "done"), [(["--force"], ["removed pair"]), (["--save"], ["saved k1", "removed pair"])]
)
def test_the_user_decides(cluster: Cluster, flags: list[str], done: list[str]) -> None:
    assert cli.run(["down", "pair", *flags]) == 0
    assert cluster.done == done


def test_save_rejects_a_run_from_another_machine(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.open.append("job-of-another")
    assert cli.run(["down", "pair", "--save"]) == 2
    assert "job-of-another" in capsys.readouterr().err
    assert cluster.done == ["saved k1"]


def test_a_cluster_that_is_idle_or_unreachable_is_removed(cluster: Cluster) -> None:
    cluster.answers = False
    assert cli.run(["down", "pair"]) == 0
    cluster.answers, cluster.open = True, []
    assert cli.run(["down", "pair"]) == 0
    assert cluster.done == ["removed pair"] * 2
    assert cli.run(["down", "pair", "--force", "--save"]) == 2
