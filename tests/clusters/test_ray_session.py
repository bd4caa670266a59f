"""A Ray that is kept for the next command: reused, private, and stopped after its idle time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.clusters import reaper
from launcher.clusters.base import Use, kind_of
from launcher.clusters.local import ray_session
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.clusters.local.kind import LocalCluster
from launcher.config.checks import check_values
from launcher.config.schema import Job
from launcher.errors import ConfigError
from tests.support.waiting import wait_for

USE = """
import sys, time
from launcher.clusters.local.embedded_ray import EmbeddedRay
with EmbeddedRay(keep_minutes=float(sys.argv[1])) as cluster:
    import ray
    answer = ray.get(ray.remote(lambda: 42).remote())
    print(cluster.address, answer, cluster.dead_process(), flush=True)
    if len(sys.argv) > 2:
        time.sleep(60)
"""


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    yield tmp_path / "launch"
    if (kept := ray_session.current()) is not None:
        ray_session.end(kept)


def use(minutes: float, *more: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-c", USE, str(minutes), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    where, answer, dead = process.stdout.readline().split()
    assert (answer, dead) == ("42", "None")
    return where


def test_the_next_command_reuses_it_until_its_idle_time_ends(private: Path) -> None:
    """The token is private; a killed command releases it; parallel commands and other environments get another Ray."""
    first = use(0.5)
    where = address(first)
    assert first.wait(240) == 0
    kept = ray_session.current()
    assert kept is not None
    assert (private.stat().st_mode & 0o777, (private / "session.json").stat().st_mode & 0o777) == (0o700, 0o600)
    processes = reaper.marked(kept.marker)
    assert kept.token not in str([Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [kept.keeper, *processes]])
    assert not ray_session.in_use()

    second = use(0.5, "wait")  # the same Ray again, by a command that is killed while it uses it
    assert address(second) == where
    assert ray_session.in_use()
    third = use(0.5)  # it is in use, so another Ray is started
    assert address(third) != where
    assert third.wait(240) == 0
    second.kill()
    second.wait()
    wait_for(lambda: not ray_session.in_use())
    assert ray_session.current() == kept

    other = use(0.01, SOMETHING="else")  # another environment: the workers would have the old one
    assert address(other) != where
    assert other.wait(240) == 0
    assert not reaper.marked(kept.marker)
    newer = ray_session.current()
    assert newer is None or newer.keeper != kept.keeper
    wait_for(lambda: ray_session.current() is None)  # 0.6 s without use
    wait_for(lambda: newer is None or not reaper.marked(newer.marker))


def test_status_and_down_of_a_kept_ray_also_after_its_keeper_was_killed(private: Path) -> None:
    def launch(*words: str) -> str:
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout

    assert json.loads(launch("status", "--json")) == []
    assert use(5).wait(240) == 0
    (found,) = json.loads(launch("status", "--json"))
    assert (found["state"], found["keep_minutes"]) == ("idle", 5)
    kept = ray_session.current()
    assert kept is not None
    launch("down")
    assert ray_session.current() is None
    assert not reaper.marked(kept.marker)

    assert use(5).wait(240) == 0
    kept = ray_session.current()
    assert kept is not None
    os.kill(kept.keeper, 9)
    wait_for(lambda: not reaper.marked(kept.marker))
    again = subprocess.run(
        [sys.executable, "-m", "launcher", "down"], capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert again.returncode == 0, "nothing is left to stop"


def test_a_directory_that_other_users_can_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "launch").mkdir(mode=0o755)

    assert ray_session.runtime_directory() is None
    with ray_session.lease(5) as kept:
        assert kept is None
    assert not any((tmp_path / "launch").iterdir())


def test_negative_minutes_are_rejected() -> None:
    with pytest.raises(ConfigError, match="keep_minutes"):
        check_values(Job(cluster=LocalCluster(keep_minutes=-1)))


@pytest.mark.parametrize(("verbose", "is_sweep"), [(True, False), (False, True), (False, False)])
def test_minutes_without_effect_are_reported(verbose: bool, is_sweep: bool) -> None:
    said: list[str] = []
    use = Use([], "", verbose=verbose, preload="", is_sweep=is_sweep, report=said.append)
    connection = kind_of(LocalCluster()).connect(LocalCluster(keep_minutes=5), use)
    assert isinstance(connection, EmbeddedRay)
    assert len(said) == (verbose or is_sweep)
    assert all("cluster.keep_minutes=5" in text for text in said)
    assert connection._keep_minutes == (0 if said else 5)
