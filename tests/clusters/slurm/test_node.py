"""The tasks of a Slurm job: what they pass on to Ray and to the driver, and how they end. Ray itself is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.slurm import node
from launcher.clusters.slurm.node import NodeTask
from launcher.clusters.slurm.script import EXIT, REQUEUE
from launcher.runs import user_state
from tests.support.waiting import wait_for

# A driver that stops as `launch train` does: it ends with 128 + the number of the first signal.
DRIVER = """
import pathlib, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: sys.exit(128 + number))
pathlib.Path(sys.argv[1]).touch()
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.environ["XDG_STATE_HOME"])  # the task sets its own

    @contextlib.contextmanager
    def started(task: NodeTask, head: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        yield {"address": "127.0.0.1", "port": 1, "scratch": "/tmp", "env": dict(os.environ), "process": None}

    monkeypatch.setattr(node, "ray_node", started)


@pytest.fixture
def task(tmp_path: Path) -> NodeTask:
    return NodeTask(tmp_path / "7.0", 0, 1, 0)


def drive(task: NodeTask, monkeypatch: pytest.MonkeyPatch, numbers: list[signal.Signals], requeue: bool) -> int | str:
    """Run the first task with a driver that receives signals after its start."""
    ready = task.shared.parent / "ready"
    monkeypatch.setattr(node, "_driver", lambda *_: [sys.executable, "-c", DRIVER, str(ready)])

    def send() -> None:
        wait_for(ready.exists, 60)
        for number in numbers:
            task.take(number, None)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return node.run_head(task, str(task.shared.parent / "runs/a1"), ["train"], requeue)
    finally:
        sender.join()


@pytest.mark.parametrize(
    ("number", "requeue", "expected"),
    [
        (signal.SIGUSR1, True, REQUEUE),
        (signal.SIGUSR1, False, 143),
        (signal.SIGTERM, True, 143),  # a cancelled job does not come back
        (signal.SIGUSR2, True, 130),
    ],
)
def test_the_first_signal_decides_how_the_run_ends(
    ray: None,
    task: NodeTask,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    requeue: bool,
    expected: int | str,
) -> None:
    assert drive(task, monkeypatch, [number, signal.SIGTERM], requeue) == expected
    status = task.read("status.json")
    assert status == (None if expected == REQUEUE else {"exit": expected})
    assert task.read("ended") == {}
    assert not (task.shared / "token").exists()


def test_a_signal_before_the_driver_ends_the_task(ray: None, task: NodeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    task.count = 2  # the other one never joins
    monkeypatch.setattr(node, "_LEAVE_SECONDS", 0.0)
    task.take(signal.SIGUSR1, None)
    assert node.run_head(task, str(task.shared.parent / "runs/a1"), ["train"], True) == REQUEUE


def test_a_node_that_cannot_join_ends_the_job(
    ray: None, task: NodeTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task.count = 2
    task.shared.mkdir()
    task.write("node-1.json", {"failed": "no space left on n2"})
    monkeypatch.setattr(node, "_LEAVE_SECONDS", 0.0)
    assert node.run_head(task, str(task.shared.parent / "runs/a1"), ["train"], True) == 1
    assert "no space left on n2" in capsys.readouterr().err
    assert json.loads((task.shared / "status.json").read_text()) == {"exit": 1}


def test_a_member_leaves_when_the_first_task_ends(ray: None, tmp_path: Path) -> None:
    member = NodeTask(tmp_path, 1, 2, 0)
    member.write("ended", {})
    node.run_member(member)
    assert member.read("left-1") == {}


def test_a_restarted_job_continues_its_run(task: NodeTask) -> None:
    words = ["train", "run.resume=true", "trainer.steps=2"]
    assert "run.resume=true" in node._driver(task, words, "h:1")
    task.restarts = 1
    driver = node._driver(task, words, "h:1")
    assert [word for word in driver if word.startswith("run.resume=")] == ["run.resume=auto"]
    assert driver[-2:] == ["cluster=existing", "cluster.address=h:1"]


@pytest.mark.parametrize("root", ["/shared/runs", "abfss://runs@ada.dfs.core.windows.net/all"])
def test_a_continued_run_uses_the_ray_cluster_of_its_job(
    task: NodeTask, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """`launch` drops the words with which a run was started, such as cluster=existing, and reads the user's record."""
    monkeypatch.setenv("XDG_STATE_HOME", str(task.state))
    node._record_cluster(task, f"{root}/a1", "h:1")
    record = user_state.records()[0]
    assert (record.cluster["kind"], record.cluster["address"]) == ("existing", "h:1")
    assert record.run.endswith("/a1")
    assert record.run.startswith(root) == root.startswith("/")


def test_ray_gets_what_slurm_has_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    assert node.resources() == ["--num-cpus=6", f"--object-store-memory={int(0.3 * 1000 * 2**20)}"]


def test_workers_are_no_tasks_of_slurm(task: NodeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cluster=none` takes part as a task of srun where these variables are set; see `launcher.jobs.ranks`."""
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "RAY_AUTH_TOKEN", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "2")
    env = node.environment(task, "127.0.0.1", Path("/tmp/x"))
    assert not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "RAY_AUTH_TOKEN"} & env.keys()
    assert {"SLURM_JOB_ID", "RAY_AUTH_TOKEN_PATH"} <= env.keys()
    assert env["RAY_AUTH_MODE"] == "token"


def test_ports_are_different() -> None:
    assert len({*node.free_ports(20)}) == 20


def test_the_exit_status_is_written_for_the_script(ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(node, "_driver", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in node._TO_DRIVER}
    mask = os.umask(0o022)
    try:
        node.main([str(tmp_path), str(tmp_path / "runs/a1"), "--", "train"])
    finally:
        os.umask(mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / EXIT).read_text() == "3\n"
