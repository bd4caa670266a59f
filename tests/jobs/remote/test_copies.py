"""Copies of remote runs and sweeps: which files are copied, and when."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote.shell import Shell
from launcher.jobs.remote.copies import Copies
from launcher.jobs.remote.location import RunLocation
from launcher.runs import RunDirectory
from tests.support import servers

pytestmark = pytest.mark.skipif(bool(servers.why_no_ssh()), reason=servers.why_no_ssh() or "-")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def shell(
    server: servers.Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.getbasetemp()))
    made = Shell(server.words)
    yield made
    made.close()


def written(path: Path, content: object = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def trained(run: Path, step: int, status: str = "running") -> None:
    """Create a run on the head with one complete checkpoint and one incomplete one."""
    written(run / f"checkpoints/step-{step:08d}/manifest.json")
    written(run / f"checkpoints/step-{step + 1:08d}/data-00000.bin")
    written(run / "result.json", {"status": status, "checkpoint": f"head://{run}/checkpoints/step-{step:08d}"})
    written(run / ".heartbeat", {"host": "head", "pid": 1})


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*step*"))


def copied(shell: Shell, there: Path, here: Path) -> tuple[Copies, RunDirectory]:
    run = RunDirectory(here / "s")
    run.create()
    RunLocation("launch-1", head="pair", directory=str(there)).write(run)
    copies = Copies(shell, str(there), run)
    copies.fetch()
    return copies, run


def test_a_sweep_is_copied_with_its_trials_and_their_checkpoints(shell: Shell, tmp_path: Path) -> None:
    there = tmp_path / "there"
    written(there / "study.journal")
    written(there / "result.json", {"status": "running"})
    written(there / ".heartbeat", {"host": "head", "pid": 1})
    for number in range(3):
        trained(there / str(number), 5)
    written(there / "0/.requests/stop")
    written(there / "0/events.out.tfevents.1")
    written(there / "0/.events.out.tfevents.1.ab.gathering")
    old = time.time() - 100
    os.utime(there / "1/.heartbeat", (old, old))

    copies, run = copied(shell, there, tmp_path)

    trials = [RunDirectory(run.path / str(number)) for number in range(3)]
    for trial in trials:
        assert steps(trial.path) == ["step-00000005"]
        assert trial.result()["checkpoint"] == str(trial.checkpoints / "step-00000005")
    assert [trial.status() for trial in trials] == ["running", "sent", "running"]
    assert run.status() == "running"
    assert {path.name for path in trials[0].path.iterdir()} == {
        ".heartbeat",
        "checkpoints",
        "events.out.tfevents.1",
        "result.json",
    }

    before = {trial.path: (trial.path / "result.json").stat().st_mtime_ns for trial in trials}
    trained(there / "2", 7, "completed")
    (there / "0/checkpoints/step-00000005/manifest.json").unlink()  # removed, since another trial is better
    copies.fetch()
    changed = [trial.name for trial in trials if (trial.path / "result.json").stat().st_mtime_ns != before[trial.path]]
    assert changed == ["2"], "an unchanged file was copied again"
    assert (steps(trials[0].path), trials[2].status()) == ([], "completed")
    assert trials[2].result()["checkpoint"] == str(trials[2].checkpoints / "step-00000007")


def test_two_commands_may_copy_a_checkpoint_at_the_same_time(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    trained(there, 5)
    copy = Copies._copy

    def copied_twice(self: Copies, remote: str, local: Path, options: Any = ()) -> bool:
        found = copy(self, remote, local, options)
        if local.name.endswith(".part"):
            shutil.copytree(local, local.parent / "step-00000005")
        return found

    monkeypatch.setattr(Copies, "_copy", copied_twice)
    _, run = copied(shell, there, here)
    assert steps(run.path) == ["step-00000005"]
    assert (run.checkpoints / "step-00000005" / "manifest.json").is_file()


def test_folders_in_a_run_belong_to_the_user(shell: Shell, tmp_path: Path) -> None:
    there = tmp_path / "there"
    trained(there, 5)
    own = {"checkpoint": "/data/of/mine"}
    written(there / "samples/result.json", own)
    written(there / "samples/checkpoints/step-00000001/manifest.json")
    written(there / "samples/.owner")

    copies, run = copied(shell, there, tmp_path)
    copies.fetch()

    assert steps(run.path) == ["step-00000005"]
    assert json.loads((run.path / "samples/result.json").read_text()) == own
    assert sorted(path.name for path in (run.path / "samples").iterdir()) == [".owner", "checkpoints", "result.json"]
    assert steps(run.path / "samples") == ["step-00000001"]
