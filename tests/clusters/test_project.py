"""The files of a project that are sent to a cluster."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from launcher.clusters.remote import project
from launcher.clusters.remote.project import check, select
from launcher.errors import ConfigError
from launcher.jobs.remote import packaging


def git(directory: Path, *words: str) -> None:
    identity = ["-c", "user.name=ada", "-c", "user.email=ada@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(directory), *identity, *words], check=True, capture_output=True)


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project in git with a submodule, a nested repository, and links."""
    write(tmp_path / "library", "lib/layers.py")
    git(tmp_path / "library", "init", "-q")
    git(tmp_path / "library", "add", ".")
    git(tmp_path / "library", "commit", "-qm", "x")
    directory = tmp_path / "project"
    write(directory, "train.py", "data/a.csv", "conf/a.yaml", "outside.txt")
    (directory / ".gitignore").write_text("data/\n__pycache__/\n")
    git(directory, "init", "-q")
    git(directory, "submodule", "add", "-q", str(tmp_path / "library"), "vendor/library")
    git(directory, "add", ".")
    git(directory, "commit", "-qm", "x")
    write(directory / "nested", "own.py")
    git(directory / "nested", "init", "-q")
    return directory


def test_submodules_and_nested_repositories_are_sent(repository: Path) -> None:
    chosen = select(repository)
    assert {"vendor/library/lib/layers.py", "nested/own.py", "train.py"} <= set(chosen.files)
    assert not any(".git/" in name or name.startswith("data/") for name in chosen.files)


def test_a_submodule_that_is_not_checked_out_is_named(repository: Path) -> None:
    git(repository, "submodule", "--quiet", "deinit", "-f", "vendor/library")
    chosen = select(repository)
    assert chosen.submodules == ["vendor/library"]
    assert re.search(r"vendor/library \(.*: git submodule update --init\)", chosen.withheld())


def test_files_that_git_ignores_are_named(repository: Path) -> None:
    write(repository, "__pycache__/x.pyc")
    assert select(repository).of_git == ["data/"]
    assert re.search(r"data/ \(.*\bgit\)", select(repository).withheld())


@pytest.mark.parametrize("in_git", [True, False])
def test_links_within_the_project_are_sent_and_others_are_named(repository: Path, tmp_path: Path, in_git: bool) -> None:
    if not in_git:
        for name in (".git", "nested/.git", "vendor/library/.git"):
            (repository / name).rename(tmp_path / f"moved-{name.replace('/', '-')}")
    (repository / "file.yaml").symlink_to("conf/a.yaml")
    (repository / "absolute.yaml").symlink_to(repository / "conf/a.yaml")
    (repository / "folder").symlink_to("conf")
    (repository / "away").symlink_to(tmp_path / "library")
    (repository / "broken").symlink_to("nowhere")
    chosen = select(repository)
    assert {"file.yaml", "absolute.yaml", "folder"} <= set(chosen.files)
    assert chosen.links == ["away", "broken"]
    packed = packaging.pack(repository, None, tmp_path / "packed")
    assert "away, broken (" in packed.withheld
    copy = tmp_path / "packed" / "calling"
    assert os.readlink(copy / "folder") == "conf"
    assert (copy / "folder" / "a.yaml").read_text() == (copy / "absolute.yaml").read_text() == "conf/a.yaml"


def test_the_home_directory_is_never_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "project", "train.py")
    for directory in (tmp_path / "home", tmp_path, Path("/")):
        with pytest.raises(ConfigError, match=rf" {directory.resolve()}, "):
            select(directory)
    check(tmp_path / "home" / "project")
    assert project.select(tmp_path / "home" / "project").files == ["train.py"]
