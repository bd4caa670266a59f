"""The embedded Ray: the processes that it starts, and that none is left."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import ray

from launcher.clusters import reaper
from launcher.clusters.local.embedded_ray import EmbeddedRay
from tests.support.waiting import wait_for


def test_a_session_is_quiet_private_and_leaves_nothing(tmp_path: Path) -> None:
    """A driver in a separate process inspects its Ray: no port on the network, a token, no files in the home directory,
    no unnecessary processes, no changed environment variables, and no output."""
    home, current = tmp_path / "home", tmp_path / "current"
    home.mkdir()
    current.mkdir()
    driver = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("look_at_session.py"))],
        capture_output=True,
        text=True,
        cwd=current,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=240,
    )
    assert driver.returncode == 0, driver.stderr
    assert driver.stderr == ""
    found = ast.literal_eval(driver.stdout)

    assert found["answer"] == 42
    assert found["with_token"] == "in"
    assert "token" in found["without_token"].lower(), found["without_token"]
    assert found["open_to_the_network"] == []
    assert len(found["processes"]) <= 7, found["processes"]  # GCS, raylet, two agents, up to two waiting workers
    assert found["longest_socket"] <= 100
    assert found["environment"] == []
    assert found["left"] == []
    assert not found["directory_left"]
    assert found["seconds_to_stop"] < 60
    assert not list(home.iterdir())
    assert not list(current.iterdir())


def test_a_running_ray_is_used_and_left_running() -> None:
    """As in a notebook."""
    with EmbeddedRay(2, 0) as own:
        with EmbeddedRay(8, 0) as borrowed:
            assert borrowed.existing
            assert not own.existing
            assert borrowed.available == (2.0, 0.0)
            assert borrowed.directory.is_dir()
        assert not borrowed.directory.exists()
        assert ray.is_initialized()
        assert ray.get(ray.remote(lambda: 42).remote()) == 42
    assert not ray.is_initialized()
    with EmbeddedRay(1, 0):  # a second session in one process has another token, and Ray notices
        assert ray.get(ray.remote(lambda: 43).remote()) == 43


# ---- the reaper -----------------------------------------------------------------------------------------------------


def test_the_reaper_kills_processes_with_the_marker_and_their_children_only(tmp_path: Path) -> None:
    """Children with another environment are killed as well."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    (directory / "file").write_text("x")
    stubborn = "import signal, subprocess; signal.signal(15, signal.SIG_IGN); subprocess.run(['sleep', '60'], env={})"
    ours = subprocess.Popen([sys.executable, "-c", stubborn], env={"TEST_MARKER": "abc"})
    longer = subprocess.Popen(["sleep", "60"], env={"TEST_MARKER": "abcd"})
    bare = subprocess.Popen(["sleep", "60"], env={})
    try:
        wait_for(lambda: len(reaper.marked("TEST_MARKER=abc")) == 2)
        grandchild = next(pid for pid in reaper.marked("TEST_MARKER=abc") if pid != ours.pid)
        program = [sys.executable, "-I", "-S", reaper.__file__, "TEST_MARKER=abc", str(directory), str(os.getpid())]
        with subprocess.Popen(program, stdin=subprocess.PIPE) as watcher:
            time.sleep(0.5)
            assert ours.poll() is None  # while the driver is alive
            assert watcher.stdin is not None
            watcher.stdin.close()
            assert watcher.wait(timeout=240) == 0

        assert ours.wait(timeout=240) == -9
        assert not _runs(grandchild)
        assert longer.poll() is None
        assert bare.poll() is None
        assert not directory.exists()
    finally:
        for process in (ours, longer, bare):
            process.kill()
            process.wait()


def _runs(pid: int) -> bool:
    try:
        return reaper._stat(pid)[0] != "Z"
    except OSError:
        return False
