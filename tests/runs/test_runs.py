"""The listing of runs, their logs, and the run directory on disk."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from launcher import runs
from launcher.errors import ConfigError, RunError
from launcher.runs import RunDirectory
from tests.support.command import TOY, Place


def make(root: Path, name: str, **result: Any) -> RunDirectory:
    run = RunDirectory(root / name)
    run.create()
    run.config.write_text("{}\n")
    run.write_result(result)
    return run


def test_the_table(here: Place) -> None:
    assert here.here("runs").out == ""
    best = {"tag": "val/loss", "value": 0.25, "step": 40}
    metrics = {"train/loss": 0.5, "val/loss": 0.3}
    facts = {"steps": 40, "workers": 2, "seconds": 185.0, "cost_usd": None, "metrics": metrics, "best": best}
    make(here.runs, "done", status="completed", **facts)
    lost = make(here.runs, "gone", status="running", **facts | {"best": None})
    os.utime(lost.config, (time.time() + 10,) * 2)
    (here.runs / "no run").mkdir()
    shown = here.here("runs")
    assert shown.status == 0
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["run", "state", "step", "train/loss", "best", "workers", "time", "USD"]
    assert lines[1] == ["done", "completed", "40", "0.5000", "val/loss", "0.2500", "at", "40", "2", "3m05s"]
    assert lines[2][:3] == ["gone", "lost", "40"]
    rows = json.loads(here.here("runs", "--json").out)
    assert [(row["name"], row["status"]) for row in rows] == [("done", "completed"), ("gone", "lost")]
    assert rows[0]["directory"] == str(here.runs / "done")
    assert rows[0]["best"] == best


def test_a_damaged_record_hides_no_other_run(here: Place) -> None:
    make(here.runs, "good", status="completed")
    bad = make(here.runs, "bad", status="completed")
    (bad.path / "result.json").write_text("{")
    (here.runs / "early").mkdir()
    (here.runs / "early/result.json").write_text("{}")  # without a configuration
    shown = json.loads(here.here("runs", "--json").out)
    assert {row["name"]: row["status"] for row in shown} == {
        "good": "completed",
        "bad": "unreadable",
        "early": "unknown",
    }


def test_logs(here: Place) -> None:
    assert here.here(*TOY, "run.name=a", "model.speak=true").status == 0
    shown = here.here("logs", "a")
    assert shown.status == 0
    assert shown.out == (here.runs / "a/log.txt").read_text()
    assert "[rank 0] step 3 of the model" in shown.out
    assert here.here("logs", "a", "--no-follow").out == shown.out
    refused = here.here("logs", "b")
    assert refused.status == 2
    assert 'There is no run "b"' in refused.err


def test_logs_of_a_run_that_printed_nothing(here: Place) -> None:
    make(here.runs, "a", status="failed")
    refused = here.here("logs", "a")
    assert refused.status == 2
    assert "log.txt" in refused.err


def test_a_heartbeat(tmp_path: Path) -> None:
    run = make(tmp_path, "a", status="running")
    assert run.status() == "lost", "there is no heartbeat yet"
    run.beat()
    assert run.status() == "running"
    heart = tmp_path / "a/.heartbeat"
    old = time.time() - runs.LOST_AFTER_SECONDS - 1
    os.utime(heart, (old, old))
    assert run.status() == "lost"
    # The end of a process of this machine is detected immediately.
    runs.write_json(heart, {"host": socket.gethostname(), "pid": 2**22 + 1})
    assert run.status() == "lost"
    runs.write_json(heart, {"host": "elsewhere", "pid": 2**22 + 1})
    assert run.status() == "running"


@pytest.mark.parametrize("name", ["..", "a/..", "/etc", "a//b", ".hidden", "", "a\nb", "../runs/a"])
def test_invalid_names_are_rejected(tmp_path: Path, name: str) -> None:
    make(tmp_path / "runs", "a", status="completed")
    with pytest.raises(ConfigError):
        runs.find(tmp_path / "runs", name)


@pytest.mark.parametrize("before", ["stopped", "failed", "running"])
def test_of_concurrent_resumes_one_succeeds(before: str, tmp_path: Path) -> None:
    """Would be wrong: two drivers that write to one directory."""
    run = make(tmp_path, "a", status=before)
    together = Barrier(8)

    def claims(_: int) -> bool:
        together.wait()
        try:
            run.claim()
        except RunError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claims, range(8))) == 1
    assert run.status() == "running"


def test_a_lock_of_a_dead_process_is_released(tmp_path: Path) -> None:
    run = make(tmp_path, "a", status="running")
    code = """
import os, sys
from pathlib import Path
from launcher.runs import directory as runs
run = runs.RunDirectory(Path(sys.argv[1]))
with runs._locked(run.config):
    run.beat()
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    run.claim()
    assert run.status() == "running"


def test_a_trial_is_found_by_its_name_in_tensorboard(tmp_path: Path) -> None:
    make(tmp_path / "s", "7", status="completed")
    assert runs.find(tmp_path, "s/007").name == "7"
    with pytest.raises(RunError):
        runs.find(tmp_path, "s/008")


def test_the_nearest_name(tmp_path: Path) -> None:
    make(tmp_path, "mnist-20261123", status="completed")
    with pytest.raises(RunError, match=r'"mnist-20261124" .* 1 .*"mnist-20261123"\?'):
        runs.find(tmp_path, "mnist-20261124")


def test_the_result_is_written_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, "a", status="running", steps=1234567)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    run.write_result({"status": "failed"})
    assert run.result() == {"status": "failed"}
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "result.json"]


def test_board_needs_a_root(here: Place) -> None:
    refused = here.here("board")
    assert refused.status == 2
    assert "run.root=DIRECTORY" in refused.err
