"""The private records of a user's clusters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.clusters.remote import registry
from launcher.errors import ClusterError

HEAD = registry.Head(
    name="pair",
    kind="ssh",
    ssh=["ssh", "-p", "2222", "ada@vm1"],
    python="/opt/env/bin/python",
    address="10.0.0.4:6379",
    dashboard=8265,
    directory="/home/ada/.launch",
    created="2026-11-24T02:30:00+00:00",
    hosts=[{"name": "vm1", "address": "10.0.0.4", "state": "lives"}],
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_record_is_saved_privately_and_loaded(state: Path) -> None:
    registry.save(HEAD)
    assert registry.load("pair") == HEAD
    path = state / "launch" / "clusters" / "pair.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_records_are_listed_and_removed(state: Path) -> None:
    assert registry.all_heads() == []
    for name in ("b", "a"):
        registry.save(registry.Head(**{**vars(HEAD), "name": name}))
    (state / "launch" / "clusters" / "broken.json").write_text("{")
    (state / "launch" / "clusters" / "other.json").write_text("[1]")
    assert [head.name for head in registry.all_heads()] == ["a", "b"]
    registry.forget("a")
    registry.forget("a")
    assert [head.name for head in registry.all_heads()] == ["b"]


def test_a_file_of_a_later_version_is_read(state: Path) -> None:
    registry.save(HEAD)
    path = state / "launch" / "clusters" / "pair.json"
    path.write_text(path.read_text().replace("{", '{"invented_later": 1,', 1))
    assert registry.load("pair") == HEAD


def test_an_unknown_name_is_an_error_with_the_most_similar_name() -> None:
    with pytest.raises(ClusterError, match="`launch up`"):
        registry.load("pair")
    registry.save(HEAD)
    with pytest.raises(ClusterError, match=r'"pear"\. .*"pair"'):
        registry.load("pear")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 64])
def test_a_name_that_is_not_a_valid_file_name(name: str) -> None:
    with pytest.raises(ClusterError, match=f'^"{re.escape(name)}"'):
        registry.save(registry.Head(**{**vars(HEAD), "name": name}))
