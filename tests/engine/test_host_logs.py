"""Machines without a shared disk: no output and no log of a run is lost, on whichever machine rank 0 runs."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.engine import entry, shared_storage
from launcher.engine.runtime import Runtime
from launcher.errors import WorkerLost
from launcher.runs import RunDirectory
from launcher.runs.mirror import Mirrored, local
from tests.engine.test_checkpoint_ranks import run
from tests.support.engine_ranks import make_job

NEVER = 1e6  # seconds


class _Control:
    """Prints a line per step, and kills the process when the step `last` is done and the file `saved` exists."""

    def __init__(self, begun: int, last: int | None, saved: Path) -> None:
        self._step, self._last, self._saved = begun, last, saved

    def requests(self) -> frozenset[str]:
        if self._step == self._last:
            while not self._saved.exists():
                time.sleep(0.02)
            print(f"step {self._step + 1} on {socket.gethostname()}")  # this line is not uploaded in time
            os._exit(9)
        self._step += 1
        print(f"step {self._step} on {socket.gethostname()}")
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        pass


def _session(
    rank: int, group: Any, uri: str, tmp_path: Path, hosts: list[str], begun: int, steps: int, killed: bool
) -> None:
    """Train to `steps` as a rank on its own simulated machine; rank 0's is `killed` before the next step."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / hosts[rank])
    socket.gethostname = lambda: hosts[rank]
    if killed:
        shared_storage.GATHERED_SYNC_SECONDS = NEVER  # only files that are uploaded with a checkpoint arrive
    job = make_job(steps=steps + killed, checkpoint={"every": 2, "keep": 1})
    saved = tmp_path / "runs" / "run" / "checkpoints" / f"step-{steps - killed:08}" / "manifest.json"
    control = _Control(begun, steps if killed and rank == 0 else None, saved)
    runtime = Runtime.adopt(rank, dist.get_world_size(), rank, dist.get_world_size(), "cpu")
    with pytest.raises(WorkerLost) if killed else nullcontext():
        entry.run(entry.Task("train", job, f"{uri}/run"), runtime, control)


def _sessions(tmp_path: Path, *sessions: tuple[list[str], int, bool]) -> Path:
    """Train one session after another on these machines, by rank, to these steps; return the run's directory."""
    begun = 0
    uri = f"head://{tmp_path}/runs"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "driver")
    for hosts, steps, killed in sessions:
        driven = RunDirectory(local(f"{uri}/run"))
        mirrored = Mirrored.of(driven)
        assert mirrored is not None
        mirrored.pull()
        driven.create()
        mirrored.publish()
        run(len(hosts), _session, uri, tmp_path, hosts, begun, steps, killed, tmp_path=tmp_path, dying=int(killed))
        begun = steps - killed
    return tmp_path / "runs" / "run"


def _printed(log: Path) -> list[str]:
    """Return the lines of a log that the model has printed."""
    return [line.partition("] ")[2] for line in log.read_text().splitlines() if "] step " in line and " on " in line]


def test_the_log_is_complete_when_rank_0_changes_machines(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    run = _sessions(tmp_path, (["a", "b"], 2, False), (["b", "a"], 4, False), (["a", "b"], 6, False))
    assert _printed(run / "log.txt") == [
        f"step {step} on {host}" for host, steps in (("a", (1, 2)), ("b", (3, 4)), ("a", (5, 6))) for step in steps
    ]
    assert _printed(run / "log-a.txt") == ["step 3 on a", "step 4 on a"]
    assert _printed(run / "log-b.txt") == [f"step {step} on b" for step in (1, 2, 5, 6)]
    ends = re.findall(r"\] completed\b\D*(\d+)", (run / "log.txt").read_text())
    assert ends == ["2", "4", "6"]


def test_the_output_of_a_killed_machine_is_not_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """Rank 0's machine is lost after step 3; the run continues on the other from step 2, and it returns later."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    run = _sessions(tmp_path, (["a", "b"], 3, True), (["b"], 4, False), (["b", "a"], 6, False))
    steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert steps == {1, 2, 3, 4, 5, 6}, "metrics logged before the checkpoint are lost"
    log, later = _printed(run / "log.txt"), _printed(run / "log-a.txt")
    assert log[:2] == ["step 1 on a", "step 2 on a"]
    assert [line for line in log if line.endswith("on b")] == [f"step {step} on b" for step in (3, 4, 5, 6)]
    from_a = [line for line in (*log, *later) if line.endswith("on a")]
    assert from_a == [f"step {step} on a" for step in (1, 2, 3, 4, 5, 6)], "lines are lost or duplicated"
    assert later[-3:] == ["step 4 on a", "step 5 on a", "step 6 on a"]
