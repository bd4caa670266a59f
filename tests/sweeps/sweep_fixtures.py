"""Fixtures of the tests of sweeps: a project in this directory, and runs in a temporary directory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PROJECT = HERE / "project"

Sweep = Callable[..., dict[str, Any]]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the fixed words of a fast sweep in this process."""
    monkeypatch.chdir(HERE)
    return ["experiment=line", "cluster=none", f"run.root={tmp_path}"]


@pytest.fixture
def sweep(words: list[str]) -> Sweep:
    """Return a function that calls `launcher.sweep` with these words and more."""
    import launcher

    def call(*more: str, **options: Any) -> dict[str, Any]:
        return launcher.sweep(*words, *more, config_dir=PROJECT, quiet=True, **options)

    return call


def table(directory: str | Path) -> list[dict[str, str]]:
    """Read trials.csv."""
    with (Path(directory) / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result(directory: str | Path, trial: int | str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(directory) / str(trial) / "result.json").read_text())
    return found
