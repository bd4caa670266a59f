"""The embedded Ray: what it asks of the machine, what it starts, and what it leaves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.clusters import local, reaper
from launcher.clusters.local import EmbeddedRay, check_feasible
from launcher.errors import ResourceError


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "available"),
    [
        (2, 1.0, 0.0, (2, 0)),
        (3, 0.5, 0.0, (2, 0)),
        (10, 0.1, 0.0, (1, 0)),
        (2, 1.0, 1.0, (8, 2)),
        (4, 1.0, 0.5, (8, 2)),
        (1, 4.0, 2.0, (8, 2)),
    ],
)
def test_what_fits_is_let_through(workers: int, cpus: float, gpus: float, available: tuple[float, float]) -> None:
    check_feasible(workers, cpus, gpus, available)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "available", "says"),
    [
        (4, 1.0, 0.0, (2, 0), ["4 workers", "4 in all", "2 CPUs", "scaling.workers=2", "scaling.cpus_per_worker=0.5"]),
        (5, 0.5, 0.0, (2, 0), ["2.5 in all", "scaling.workers=4", "scaling.cpus_per_worker=0.4"]),
        (3, 1.0, 0.0, (2, 0), ["scaling.workers=2", "scaling.cpus_per_worker=0.66"]),
        (2, 1.0, 1.0, (8, 1), ["1 GPUs", "scaling.workers=1"]),
        (2, 1.0, 1.0, (8, 0), ["0 GPUs", "scaling.device=cpu"]),
        (3, 1.0, 0.6, (8, 2), ["2 GPUs", "scaling.workers=2"]),  # 0.6 + 0.6 do not fit on one GPU
        (1, 4.0, 0.0, (2, 0), ["1 worker with 4 CPU", "scaling.cpus_per_worker=2"]),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers_and_a_way_out(
    workers: int, cpus: float, gpus: float, available: tuple[float, float], says: list[str]
) -> None:
    with pytest.raises(ResourceError) as caught:
        check_feasible(workers, cpus, gpus, available)

    for words in says:
        assert words in str(caught.value)


def test_the_advice_of_a_refusal_fits() -> None:
    for workers in range(1, 40):
        for cpus in (1, 2, 3, 7):
            share = math.floor(cpus / workers * 100) / 100
            check_feasible(workers, share, 0.0, (cpus, 0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"job/cpu.max": "max 100000"}, None),
        ({"job/cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "50000 100000", "job/cpu.max": "max 100000"}, 0.5),  # a limit of the group above holds too
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_limits_of_containers_count(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    """Would be wrong: two workers on a container that may use half a CPU of a machine with 64."""
    root = tmp_path / "cgroup"
    (root / "job").mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "membership").write_text("0::/job\n")

    assert local._cpu_quota(root, tmp_path / "membership") == expected


def test_resources_are_asked_without_torch_and_without_starting_anything() -> None:
    code = "import sys; from launcher.clusters.local import resources; print(*resources(), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert 1 <= int(output[0]) <= (os.cpu_count() or 1)
    assert output[2] == "False"


# ---- Ray ------------------------------------------------------------------------------------------------------------


def test_a_session_is_quiet_private_and_leaves_nothing(tmp_path: Path) -> None:
    """One driver in a process of its own looks at its Ray from the inside; would be wrong: a port that the network
    sees, no token, files in the home directory, helper processes nobody needs, variables or chatter left behind."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    driver = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("look_at_session.py"))],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )
    assert driver.returncode == 0, driver.stderr
    assert driver.stderr == ""
    found = eval(driver.stdout)  # a literal dict that our own program printed

    assert found["answer"] == 42
    assert found["with_token"] == "in"
    assert "token" in found["without_token"].lower(), found["without_token"]
    assert found["open_to_the_network"] == []
    assert len(found["processes"]) <= 7, found["processes"]  # GCS, raylet, two agents, up to two waiting workers
    assert found["longest_socket"] <= 100
    assert found["environment"] == []
    assert found["left"] == []
    assert not found["directory_left"]
    assert found["seconds_to_stop"] < 5
    assert not list(home.iterdir())
    assert not list(elsewhere.iterdir())


def test_a_ray_that_is_there_is_used_and_left_running() -> None:
    """Would be wrong: a notebook whose Ray is gone after the first launch."""
    import ray

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


def test_the_reaper_ends_what_carries_the_marker_with_its_children_and_nothing_else(tmp_path: Path) -> None:
    """Would be wrong: a child with an environment of its own survives, or somebody else's process dies."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    (directory / "file").write_text("x")
    stubborn = "import signal, subprocess; signal.signal(15, signal.SIG_IGN); subprocess.run(['sleep', '60'], env={})"
    ours = subprocess.Popen([sys.executable, "-c", stubborn], env={"TEST_MARKER": "abc"})
    longer = subprocess.Popen(["sleep", "60"], env={"TEST_MARKER": "abcd"})
    bare = subprocess.Popen(["sleep", "60"], env={})
    try:
        _wait_until(lambda: len(reaper.marked("TEST_MARKER=abc")) == 2)
        grandchild = next(pid for pid in reaper.marked("TEST_MARKER=abc") if pid != ours.pid)
        program = [sys.executable, "-I", "-S", reaper.__file__, "TEST_MARKER=abc", str(directory), str(os.getpid())]
        with subprocess.Popen(program, stdin=subprocess.PIPE) as watcher:
            time.sleep(0.5)
            assert ours.poll() is None  # nothing happens while the driver lives
            assert watcher.stdin is not None
            watcher.stdin.close()
            assert watcher.wait(timeout=10) == 0

        assert ours.wait(timeout=1) == -9
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


def _wait_until(true: object) -> None:
    deadline = time.monotonic() + 5
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
