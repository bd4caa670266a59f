"""Two machines without a shared run root: all files are written to the disk of the driver's machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.clusters.test_existing import TINY, launch
from tests.support.command import PROJECT
from tests.support.vmlab.lab import Lab

SAVED = ("checkpoint.every=2", "checkpoint.keep=2", "strategy=fsdp", "trainer.deterministic=false")


@pytest.mark.slow
def test_checkpoints_of_two_machines_are_on_the_head(cluster: Lab, tmp_path: Path) -> None:
    """No part of a checkpoint is on the other machine."""
    directory = Path(shutil.copytree(PROJECT, tmp_path / "calling", ignore=shutil.ignore_patterns("__pycache__")))
    root = f"{cluster.scratch}/runs"  # the same path is another disk on each machine
    done = launch(cluster, directory, *TINY, *SAVED, "run.name=a", f"run.root=head://{root}")
    assert done.status == 0, done.err
    assert done.last == f"head://{root}/a"

    def on_head(*words: str) -> str:
        return cluster.head.run([*words]).stdout

    result = json.loads(on_head("cat", f"{root}/a/result.json"))
    assert (result["status"], result["workers"]) == ("completed", 2)
    names = on_head("find", root, "-type", "f").splitlines()
    newest = result["checkpoint"].removeprefix("head://")
    manifest = json.loads(on_head("cat", f"{newest}/manifest.json"))
    assert {f"{newest}/{name}" for name in manifest["files"]} <= set(names)
    parts = [name for name in manifest["files"] if name.startswith("data-")]
    assert len(parts) == 2, "each machine writes its half of the network"
    assert not [name for name in names if name.endswith(".gathering")]
    assert cluster.hosts[1].run(["ls", root]).returncode != 0, "a file is on the other machine"

    shutil.rmtree(cluster.directory / "vm2" / ".cache", ignore_errors=True)
    words = ("run.name=a", "run.resume=true", f"run.root=head://{root}", "trainer.epochs=2")
    again = launch(cluster, directory, *words)
    assert again.status == 0, again.err
    assert "Continuing from step 10." in again.err
    assert json.loads(on_head("cat", f"{root}/a/result.json"))["steps"] == 20
    assert launch(cluster, directory, "stop", "a", f"run.root=head://{root}").status == 2

    plain = launch(cluster, directory, *TINY, "run.name=b", f"run.root={root}")
    assert plain.status == 2, plain.err
    assert "is missing on vm2" in plain.err
