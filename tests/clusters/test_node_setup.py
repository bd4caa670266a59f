"""What a job needs on the nodes: read from the calling directory, met there, and told where it is not."""

from __future__ import annotations

from pathlib import Path

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
    assert not NodeSetup.of(project.HOME, []), "launch's own packages are there"


def test_a_project_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project\n")
    with pytest.raises(ConfigError, match=r"pyproject\.toml cannot be read"):
        NodeSetup.of(tmp_path, [])


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"setup": ["echo one > made", "test -f made"]}, ""),
        ({"setup": ["true", "echo what is wrong >&2; exit 3"]}, "ended with status 3: what is wrong"),
        ({"file": "requirements.txt"}, ""),
        ({"packages": ["torch==1.0.0"]}, "stay) ended with status 1"),
    ],
)
def test_lines_and_packages_on_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: dict[str, object], says: str
) -> None:
    """In this process: all is installed already, or refused since torch has to stay."""
    monkeypatch.setattr("launcher.clusters.remote.from_driver.adopt", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "requirements.txt").write_text("rich\n")
    given = {"file": None, "packages": [], "setup": [], "names": [], **needs}
    told = _work()(str(project.HOME), str(tmp_path), given)
    assert says in told if says else told == ""
    assert (tmp_path / "made").exists() == (needs == {"setup": ["echo one > made", "test -f made"]})
