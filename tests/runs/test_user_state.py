"""The user's own record of runs: private, keyed by path, and the only source of a run's location."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.runs import RunDirectory, user_state


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "launch"


def test_a_record_is_private_and_keeps_unchanged_fields(state: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a")
    state.mkdir(mode=0o755, parents=True)
    user_state.save(run, cluster={"kind": "existing"}, place={"job": "launch-1"})
    record = user_state.save(run, token="f")
    assert user_state.lookup(run) == record
    assert (record.cluster, record.place, record.token) == ({"kind": "existing"}, {"job": "launch-1"}, "f")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (state, state / "runs")}
    assert modes == {0o700}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state / "runs").iterdir()] == [0o600]


def test_a_record_belongs_to_one_path(tmp_path: Path) -> None:
    """A symbolic link among the parents leads to the same run; a copy of the run is a different run."""
    run = RunDirectory(tmp_path / "runs" / "a")
    run.create()
    user_state.save(run, cluster={"kind": "ssh"})
    (tmp_path / "other").symlink_to(tmp_path / "runs")
    assert user_state.lookup(RunDirectory(tmp_path / "other" / "a")) is not None
    shutil.copytree(run.path, tmp_path / "runs" / "b")
    assert user_state.lookup(RunDirectory(tmp_path / "runs" / "b")) is None
    (tmp_path / "runs" / "c").symlink_to(run.path)
    assert user_state.lookup(RunDirectory(tmp_path / "runs" / "c")) is None


def test_a_trial_has_the_cluster_of_its_sweep(tmp_path: Path) -> None:
    sweep = RunDirectory(tmp_path / "s")
    user_state.record_cluster(sweep, {"kind": "ssh", "name": "pair"})
    assert user_state.cluster_of(RunDirectory(tmp_path / "s" / "3")) == {"kind": "ssh", "name": "pair"}
    assert user_state.cluster_of(RunDirectory(tmp_path / "t" / "3")) == {}
    user_state.record_cluster(sweep, {"kind": "local"})
    assert user_state.cluster_of(sweep) == {}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"run": 1}', '{"cluster": {}}', "[" * 5000 + "]" * 5000])
def test_a_damaged_record_is_none(state: Path, tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path / "a")
    user_state.save(run, cluster={"kind": "ssh"})
    (path,) = (state / "runs").iterdir()
    path.write_text(content)
    assert user_state.lookup(run) is None
    path.write_text(json.dumps({"run": user_state.key_of(run), "cluster": {"kind": "ssh"}, "of_a_later_version": 1}))
    assert user_state.cluster_of(run) == {"kind": "ssh"}


def test_a_state_directory_that_cannot_be_written_is_an_error(state: Path, tmp_path: Path) -> None:
    state.parent.write_text("a file")
    with pytest.raises(RunError, match="XDG_STATE_HOME"):
        user_state.save(RunDirectory(tmp_path / "a"), cluster={"kind": "ssh"})
