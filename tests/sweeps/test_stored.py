"""Sweeps whose run root is an object store: files, listing, resume on this machine and on another one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from sweep_fixtures import HERE, PROJECT

import launcher
from launcher.cli.listing import rows
from launcher.errors import RunError
from launcher.jobs.prepare import root_of
from launcher.runs import RunDirectory, mirror, storage

URI = "gs://bucket/runs"
WORDS = ["experiment=line", "cluster=none", f"run.root={URI}", "run.name=s"]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that is a folder. As in an object store, folders need not exist before their files."""
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    def filesystem_of(uri: str) -> tuple[Any, str]:
        path = str(tmp_path / uri.partition("://")[2])
        return PyFileSystem(FSSpecHandler(LocalFileSystem(auto_mkdir=True))), path

    monkeypatch.setattr(storage, "filesystem_of", filesystem_of)
    monkeypatch.chdir(HERE)
    on_machine(tmp_path / "first", monkeypatch)
    return tmp_path / "bucket" / "runs"


def on_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continue on a machine with its own copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    mirror._refreshed.clear()


def sweep(*more: str) -> dict[str, Any]:
    return launcher.sweep(*WORDS, *more, config_dir=PROJECT, quiet=True)


def table(place: Path) -> list[dict[str, str]]:
    with (place / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_complete_on_the_store_and_is_resumed_on_another_machine(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("optimizer.lr=0.1,0.5,1e30", "sweep.keep=best", "logging.tensorboard=false")
    found = sweep(*more)

    place = bucket / "s"
    assert [trial["state"] for trial in found["trials"]] == ["completed", "completed", "failed"]
    assert [row["state"] for row in table(place)] == ["completed", "completed", "failed"]
    for name in ("study.journal", "best.yaml", "log.txt", "report.html"):
        assert (place / name).stat().st_size > 0
    assert json.loads((place / "result.json").read_text())["status"] == "completed"
    for number, state in enumerate(("completed", "completed", "failed")):
        own = json.loads((place / str(number) / "result.json").read_text())
        assert (own["status"], own["trial"]["number"]) == (state, number)
    assert [(place / str(number) / "checkpoints").exists() for number in range(3)] == [False, True, False]
    assert RunDirectory(root_of(URI) / "s" / "1").uri == f"{URI}/s/1"

    on_machine(tmp_path / "second", monkeypatch)
    assert [(row["name"], row["status"]) for row in rows(root_of(URI))] == [("s", "completed")]
    again = launcher.sweep(f"run.root={URI}", "run.name=s", "run.resume=true", config_dir=PROJECT, quiet=True)
    assert again["trials"] == found["trials"]
    with pytest.raises(RunError):
        sweep("optimizer.lr=0.2,0.3")


def test_an_interrupted_sweep_continues_on_another_machine(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request comes through the store, as from a third machine; the trial continues from its checkpoint there."""
    from launcher.sweeps import driver

    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)
    original = driver.Driver._event

    def request_stop(self: driver.Driver, key: str, event: dict[str, Any]) -> None:
        original(self, key, event)
        if key == "1" and event["kind"] == "progress":
            self._failure = self._failure or "stop"  # as sweep.fail_fast, without a failed trial
            self._runner._requests |= {"stop"}  # type: ignore[attr-defined]

    with monkeypatch.context() as patch:
        patch.setattr(driver.Driver, "_event", request_stop)
        first = sweep("optimizer.lr=0.1,0.2,0.3", "trainer.epochs=3", "logging.tensorboard=false")
    assert [trial["state"] for trial in first["trials"]] == ["completed", "stopped", "waiting"]
    assert json.loads((bucket / "s" / "1" / "result.json").read_text())["status"] == "stopped"

    on_machine(tmp_path / "second", monkeypatch)
    found = launcher.sweep(f"run.root={URI}", "run.name=s", "run.resume=true", config_dir=PROJECT, quiet=True)
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 3
    own = json.loads((bucket / "s" / "1" / "result.json").read_text())
    assert (own["restarts"], own["lost_steps"]) == (1, 0)
    assert [row["state"] for row in table(bucket / "s")] == ["completed"] * 3
