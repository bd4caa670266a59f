"""Resolvers that a user's module registers, for new runs and in stored configurations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.config import calling_directory, compose
from launcher.errors import ConfigError

REGISTER = "from omegaconf import OmegaConf\nOmegaConf.register_new_resolver('twice', lambda x: 2 * x, replace=True)\n"
USE = "+vars.x=${twice:4}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A calling directory; what it registers is removed after the test."""
    monkeypatch.setattr(calling_directory, "_calling", [])
    monkeypatch.setattr(calling_directory, "_guarded", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    calling_directory.add_calling_directory(tmp_path)
    yield tmp_path
    OmegaConf.clear_resolver("twice")
    for name in ("resolvers", "mine", "mine.resolvers"):
        sys.modules.pop(name, None)


def test_a_module_of_the_project(project: Path) -> None:
    (project / "resolvers.py").write_text(REGISTER)
    (project / "conf2/experiment").mkdir(parents=True)
    (project / "conf2/experiment/a.yaml").write_text("# @package _global_\nvars: {x: '${twice:4}'}\n")
    assert compose([USE]).job.vars["x"] == 8
    OmegaConf.clear_resolver("twice")
    sys.modules.pop("resolvers")
    assert compose(["experiment=a"], project / "conf2").job.vars["x"] == 8


def test_a_trusted_package(project: Path) -> None:
    (project / "mine").mkdir()
    (project / "mine/__init__.py").write_text("")
    (project / "mine/resolvers.py").write_text(REGISTER)
    assert compose([USE, "trust=[mine]"]).job.vars["x"] == 8


def test_a_stored_configuration_holds_the_values(project: Path) -> None:
    """Otherwise a run from a notebook could not be resumed, and an untrusted file could call functions."""
    (project / "resolvers.py").write_text(REGISTER)
    (project / "config.yaml").write_text(compose([USE, "+vars.y=a${twice:3}", "+vars.z=${vars.x}"]).to_yaml())
    OmegaConf.clear_resolver("twice")
    (project / "resolvers.py").unlink()
    variables = compose([], stored=project / "config.yaml").job.vars
    assert variables == {"x": 8, "y": "a6", "z": 8}
    assert "${vars.x}" in (project / "config.yaml").read_text(), "other interpolations are stored as they were written"


def test_a_stored_configuration_calls_no_resolver_of_the_project(project: Path) -> None:
    (project / "resolvers.py").write_text(REGISTER)
    (project / "config.yaml").write_text(compose([]).to_yaml().replace("vars: {}", "vars: {x: '${twice:4}'}"))
    with pytest.raises(ConfigError, match="twice"):
        compose([], stored=project / "config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"twice".* resolvers.py'),
        ("raise KeyError(1)", r'"resolvers".*KeyError.*resolvers\.py, \w+ 1\b'),
        (REGISTER.replace("2 * x", "1 / 0"), r"vars.x.*division by zero"),
    ],
)
def test_errors(text: str, message: str, project: Path) -> None:
    (project / "resolvers.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose([USE])


def test_the_module_is_not_imported_without_need(project: Path) -> None:
    (project / "resolvers.py").write_text("raise AssertionError('imported')")
    assert compose(["+vars.x=${oc.env:HOME}"]).job.vars["x"]
