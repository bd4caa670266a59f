"""The setup of nodes for a job: requirements of the calling directory and shell lines, and errors that they cause."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote import project
from launcher.clusters.remote.node_setup import NodeSetup, _work
from launcher.errors import ConfigError

PYPROJECT = '[project]\nname = "mine"\nversion = "1"\ndependencies = ["rich>=1", "numpy"]\n'


def test_requirements_come_before_the_project(tmp_path: Path) -> None:
    assert not NodeSetup.of(tmp_path, [])
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    assert NodeSetup.of(tmp_path, []).packages == ["rich>=1", "numpy"]
    (tmp_path / "requirements.txt").write_text("rich\n")
    found = NodeSetup.of(tmp_path, ["true"], ["HF_TOKEN"])
    assert (found.file, found.packages, found.setup, found.names) == ("requirements.txt", [], ["true"], ["HF_TOKEN"])
    assert found.describe() == "requirements.txt and cluster.setup"
    assert not NodeSetup.of(project.HOME, []), "launch's own packages are installed"


def test_a_project_that_cannot_be_parsed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project\n")
    with pytest.raises(ConfigError, match=r"/pyproject\.toml "):
        NodeSetup.of(tmp_path, [])


@pytest.mark.parametrize(
    ("setup", "problem"),
    [
        ({"setup": ["echo one > made", "test -f made"]}, ""),
        ({"setup": ["true", "echo what is wrong >&2; exit 3"]}, " 3: what is wrong"),
        ({"file": "requirements.txt"}, ""),
        ({"packages": ["torch==1.0.0"]}, "torch==1.0.0"),
        ({"packages": ["old @ file://{}/old-1.0-py3-none-any.whl"]}, "old 1.0 depends on torch<2"),
    ],
)
def test_lines_and_packages_on_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: dict[str, Any], problem: str
) -> None:
    """In this process, where all packages are installed, and another torch is rejected."""
    monkeypatch.setattr("launcher.clusters.remote.from_driver.adopt", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "requirements.txt").write_text("rich\n")
    with zipfile.ZipFile(tmp_path / "old-1.0-py3-none-any.whl", "w") as wheel:
        facts = "Metadata-Version: 2.1\nName: old\nVersion: 1.0\nRequires-Dist: torch<2\n"
        wheel.writestr("old-1.0.dist-info/METADATA", facts)
        wheel.writestr("old-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("old-1.0.dist-info/RECORD", "")
    given = {"file": None, "packages": [], "setup": [], "names": [], **setup}
    given["packages"] = [line.format(tmp_path) for line in given["packages"]]
    found = _work()(str(project.HOME), str(tmp_path), given)
    assert problem in found if problem else found == ""
    assert (tmp_path / "made").exists() == (setup == {"setup": ["echo one > made", "test -f made"]})
