"""The page of supported releases: its rows are the oldest and newest pairs, and results survive a rewrite."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools import compat

ROOT = Path(__file__).resolve().parent.parent


def test_the_corners_are_the_oldest_and_newest_allowed_releases() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    for name, (oldest, newest) in (("ray", compat.RAY), ("torch", compat.TORCH)):
        before, after = (Version(f"{end}.0").release for end in (oldest, newest))
        assert f"{oldest}.0" in allowed[name]
        assert f"{newest}.0" in allowed[name]
        assert f"{before[0]}.{before[1] - 1}.9" not in allowed[name]
        assert f"{after[0]}.{after[1] + 1}.0" not in allowed[name]


def test_a_pair_that_is_not_run_keeps_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "PAGE", tmp_path / "page.md")
    rows = compat.read_rows()
    assert len(rows) == 4
    assert {row["result"] for row in rows.values()} == {""}
    another = dict.fromkeys(compat.COLUMNS, "x") | {"Ray": "2.58", "torch": "2.14"}
    rows["2.58", "2.14"] = another
    compat.write_rows(rows)
    assert compat.read_rows() == rows


def test_the_page_is_as_the_tool_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compat.PAGE.read_text()
    rows = compat.read_rows()
    monkeypatch.setattr(compat, "PAGE", tmp_path / "page.md")
    compat.write_rows(rows)
    assert compat.PAGE.read_text() == page
