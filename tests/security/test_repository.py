"""A repository's own git configuration starts no program when launch reads the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.clusters.remote.project import select
from launcher.runs import provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    def git(*words: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "net.py").write_text("width = 1\n")
    (tmp_path / ".gitattributes").write_text("*.py diff=shown\n")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "net.py").write_text("width = 2\n")
    program = tmp_path / ".git" / "program"
    program.write_text(f'#!/bin/sh\ntouch {tmp_path}/mark\ncat "$1"\n')
    program.chmod(0o755)
    git("config", "core.fsmonitor", str(program))
    git("config", "diff.shown.textconv", str(program))
    git("config", "diff.external", str(program))
    return tmp_path


def test_reading_a_repository_runs_no_program_of_its_configuration(repository: Path) -> None:
    assert "width = 2" in provenance.patch(repository)
    found = provenance.git(repository)
    assert found is not None
    assert found["dirty"]
    select(repository)
    assert not (repository / "mark").exists()
