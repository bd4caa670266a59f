"""Ranks on several machines: the check of a shared run directory, and checkpoints with parts of all machines."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.engine import checkpoint
from launcher.engine.checkpoint.files import NewestCheckpoint
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.runtime import Runtime
from launcher.engine.shared_storage import check_shared, open_outputs
from launcher.errors import RunError
from launcher.runs import RunDirectory
from launcher.runs.mirror import local
from tests.engine.test_checkpoint_ranks import run
from tests.support.stores import Container


def _runtime(rank: int) -> Runtime:
    return Runtime.adopt(rank, dist.get_world_size(), rank, dist.get_world_size(), "cpu")


def _probe(rank: int, group: Any, directories: list[Path], hosts: list[str]) -> str | None:
    try:
        check_shared(RunDirectory(directories[rank]), None, _runtime(rank), hosts)
    except RunError as error:
        return str(error)
    return None


def test_a_directory_that_is_not_shared_is_reported_by_every_rank(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine" / "run", tmp_path / "other" / "run"
    mine.mkdir(parents=True)
    other.mkdir(parents=True)
    messages = run(3, _probe, [mine, mine, other], ["head", "head", "far"], tmp_path=tmp_path)
    assert all(messages)
    assert re.search(rf"run\.root .*\bfar \(\w+ 2\) .*\bhead \(\w+ 0\)\. .*{mine.parent} ", messages[0])
    assert not list(tmp_path.rglob(".probe*"))


@pytest.mark.parametrize(
    ("where", "hosts"), [(("shared", "shared"), ("head", "far")), (("shared", "absent"), ("head", "head"))]
)
def test_a_shared_directory_and_a_single_machine_pass(
    tmp_path: Path, where: tuple[str, ...], hosts: tuple[str, ...]
) -> None:
    (tmp_path / "shared").mkdir()
    assert run(2, _probe, [tmp_path / name for name in where], list(hosts), tmp_path=tmp_path) == [None, None]


def test_a_machine_without_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    messages = run(2, _probe, [tmp_path / "here", tmp_path / "gone"], ["head", "far"], tmp_path=tmp_path)
    assert re.search(r"\bfar \(\w+ 1\) .*: No such file or directory", messages[0])


def _train(rank: int, group: Any, uri: str, environment: list[dict[str, str]], steps: list[int]) -> tuple[Any, ...]:
    """Resume from the newest checkpoint, then save at `steps`, as a rank on a separate machine."""
    os.environ.update(environment[rank])
    socket.gethostname = lambda: f"machine-{rank}"
    directory = RunDirectory(local(f"{uri}/run"))

    class Control:
        def requests(self) -> frozenset[str]:
            return frozenset()

        def emit(self, event: dict[str, Any]) -> None:
            raise AssertionError(event)

    runtime = _runtime(rank)
    with open_outputs(directory, runtime, Control()) as outputs:
        uploads = outputs.uploads
        assert isinstance(uploads, Uploads)
        with outputs.log.open("a") as log:
            log.write(f"of {rank}, {steps}\n")
        assert uploads.scattered
        saver = checkpoint.Checkpointer(directory.checkpoints, keep=2, group=group, uploads=uploads)
        newest = saver.local_copy(
            NewestCheckpoint.from_dict(runtime.broadcast(saver.newest().to_dict() if rank == 0 else None))
        )
        found = None
        if newest.path is not None:
            content = checkpoint.load(newest.path)
            found = (newest.path.name, content.state["weight"].tolist(), [one["mine"].tolist() for one in content.own])
        for step in steps:
            saver.save(step, {"weight": torch.full((3,), float(step))}, {"mine": torch.tensor([rank, step])})
        saver.close()
        assert rank or 0 < (uploads.seconds or 0) < 100
    left = [path.name for path in directory.checkpoints.iterdir() if "tmp" in path.name]
    return found, left


def test_machines_without_a_common_disk_write_one_checkpoint_and_others_continue(
    container: Container, tmp_path: Path
) -> None:
    first = [container.environment(tmp_path / f"first-{rank}") for rank in range(2)]
    answers = run(2, _train, container.uri, first, [10, 20, 30], tmp_path=tmp_path)
    assert answers == [(None, [])] * 2
    assert container.intact("run") == [20, 30]
    assert not [name for name in container.names("run") if ".parts" in name or ".probe" in name]
    assert container.read("run/log.txt") == b"of 0, [10, 20, 30]\n"
    assert container.read("run/log-machine-1.txt") == b"of 1, [10, 20, 30]\n"

    other = [container.environment(tmp_path / f"second-{rank}") for rank in range(2)]
    answers = run(2, _train, container.uri, other, [40], tmp_path=tmp_path)
    assert answers == [(("step-00000030", [30.0] * 3, [[0, 30], [1, 30]]), [])] * 2
    assert container.intact("run") == [30, 40]
    assert container.read("run/log.txt") == b"of 0, [10, 20, 30]\nof 0, [40]\n"
    assert container.read("run/log-machine-1.txt") == b"of 1, [10, 20, 30]\nof 1, [40]\n"
