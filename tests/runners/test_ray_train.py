"""The Ray Train runner with real workers: events, errors, lost workers, signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_jobs import HERE, Task

from launcher.clusters import reaper
from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.errors import DataError, LaunchError, LoaderLost, NonFiniteLoss, Stopped, UserCodeError, WorkerLost
from launcher.runners import worker_errors
from launcher.runners.signals import Interrupts
from launcher.runners.supervision import Limits, again, explain
from tests.support.waiting import wait_for

CPUS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedRay]:
    with EmbeddedRay(CPUS, 0, preload=("launcher.runners.ray_train",)) as embedded:
        yield embedded


def run(cluster: EmbeddedRay, job: str, note: str = "", workers: int = 2, events: list | None = None) -> dict[str, Any]:
    from launcher.runners import ray_train

    taken: list = [] if events is None else events
    with Interrupts() as interrupts:
        return ray_train.run(
            Task(note),
            workers=workers,
            cpus_per_worker=CPUS / workers,
            gpus_per_worker=0.0,
            cluster=cluster,
            on_event=taken.append,
            interrupts=interrupts,
            main=f"ray_jobs:{job}",
        )


def test_before_training_has_begun_one_signal_is_enough(cluster: EmbeddedRay) -> None:
    """There is nothing to save yet; waiting for it would look like a launcher that ignores Ctrl-C.

    That the run gave back what it held is shown by the tests below, which need the same CPUs.
    """
    sent = _send_when_training(signal.SIGINT)

    with pytest.raises(Stopped):
        run(cluster, "until_stopped", "never trains", events=sent)


def test_a_second_signal_stops_at_once(cluster: EmbeddedRay) -> None:
    sent = _send_when_training(signal.SIGTERM, times=2)

    with pytest.raises(Stopped) as caught:
        run(cluster, "until_stopped", "deaf", events=sent)

    assert caught.value.signal_number == signal.SIGTERM
    assert time.monotonic() - sent.begun < 15


def test_a_users_own_ray_runs_more_workers_than_cpus_in_the_users_directory(cluster: EmbeddedRay) -> None:
    """Would be wrong: fractions of a CPU refused, ranks doubled, events lost or out of order, relative paths moved; and
    where Ray was there before, as in a notebook, anything that only works on a Ray of our own."""
    events: list[dict[str, Any]] = []

    with EmbeddedRay() as borrowed:
        assert borrowed.existing
        result = run(borrowed, "facts", workers=3, events=events)

    assert result["world_size"] == 3
    assert [worker["rank"] for worker in result["workers"]] == [0, 1, 2]
    assert len({worker["pid"] for worker in result["workers"]} | {os.getpid()}) == 4
    assert {worker["cwd"] for worker in result["workers"]} == {os.getcwd()}
    for rank in range(3):
        assert [event["step"] for event in events if event["rank"] == rank] == list(range(50))


def test_an_exception_on_one_rank_is_raised_as_what_it_was(cluster: EmbeddedRay) -> None:
    """Would be wrong: Ray's wrapping, or the broken connections of the other ranks, told instead of the cause."""
    begun = time.monotonic()

    with pytest.raises(UserCodeError) as caught:
        run(cluster, "fail_on_one_rank")

    assert str(caught.value) == "ZeroDivisionError: mine"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "in fail_on_one_rank\n" in caught.value.traceback_text
    assert "ZeroDivisionError: mine" in caught.value.traceback_text
    assert "ray/" not in caught.value.traceback_text
    assert "runners/ray_train.py" not in caught.value.traceback_text
    assert time.monotonic() - begun < 90  # the others do not wait for the timeout of their collective, 120 s


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLoss("The loss is nan."),
        DataError("x.csv, row 3"),
        UserCodeError("ValueError: x", "Traceback …\nValueError: x"),
        WorkerLost("gone"),
        LoaderLost("killed"),
    ],
)
def test_errors_of_ours_arrive_as_they_left(error: LaunchError) -> None:
    arrived = worker_errors.rebuild(json.loads(json.dumps(worker_errors.describe(error, rank=1))))

    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert getattr(arrived, "traceback_text", "") == getattr(error, "traceback_text", "")


def test_a_dead_loader_process_is_a_cause_and_not_what_follows() -> None:
    """Would be wrong: no restart; or the broken connections of the others are reported as the cause."""
    lost, gone = (
        worker_errors.describe(error, 0) for error in (LoaderLost("a loader process was killed"), WorkerLost("gone"))
    )
    assert (lost["lost"], lost["aftermath"]) == (True, False)
    assert (gone["lost"], gone["aftermath"]) == (False, True)
    told = explain(RuntimeError(), {}, [gone, lost | {"time": gone["time"] + 1}])
    assert isinstance(told, LoaderLost)
    verdict = {"cause": "failure", "count": 1, "most": 3}
    assert again(verdict, {}, {}, Limits(), [gone, lost]).startswith("a loader process was killed. The run is started")


def test_ray_data_reads_a_stream_though_the_workers_have_every_cpu(cluster: EmbeddedRay, tmp_path: Path) -> None:
    """Would be wrong: rows lost or doubled, another order than without Ray, tasks that wait for a CPU which never comes
    or for the other worker, a file that is gone told as Ray's trouble."""
    for shard in range(3):
        number = np.arange(100.0 * shard, 100.0 * (shard + 1))
        table = pa.table({"a": number, "y": number})
        pq.write_table(table, tmp_path / f"part-{shard}.parquet", row_group_size=(10, 10, 40)[shard])

    workers = run(cluster, "read_stream", str(tmp_path))["workers"]

    seen = [row for worker in workers for piece in worker["there"] for row in piece]
    assert sorted(seen) == list(range(280))  # the last row group is for validation
    for worker in workers:
        assert worker["there"] == worker["here"]
        assert worker["more"] == 210
        assert str(tmp_path / "part-1.parquet") in worker["failed"]


@pytest.mark.parametrize(("number", "how"), [("SIGKILL", "died without a word"), ("SIGSEGV", r"crashed.*\(SIGSEGV\)")])
def test_a_worker_that_dies_is_named(cluster: EmbeddedRay, number: str, how: str) -> None:
    """Would be wrong: "connection closed by peer" of the survivor told instead of who died, or an endless wait."""
    with pytest.raises(WorkerLost, match=rf"Worker 1 of 2 \(process \d+ on .+\) {how}.*run\.resume=true"):
        run(cluster, "die_on_one_rank", number)


class _Sender(list):
    """A list of events that sends this process signals when the first arrives."""

    def __init__(self, number: int, times: int) -> None:
        super().__init__()
        self._number, self._times = number, times
        self.begun = math.inf

    def append(self, event: Any) -> None:
        if not self:
            self.begun = time.monotonic()
            for i in range(self._times):
                threading.Timer(0.1 + i, os.kill, (os.getpid(), self._number)).start()
        super().append(event)


def _send_when_training(number: int, times: int = 1) -> _Sender:
    return _Sender(number, times)


# ---- drivers of their own -------------------------------------------------------------------------------------------


def start_driver(job: str, note: str, home: Path) -> subprocess.Popen[str]:
    """Start a driver in a session (and so a process group) of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, str(Path(HERE) / "ray_jobs.py"), job, note],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(Path(HERE).parents[1])},
    )


def test_ctrl_c_in_a_terminal_reaches_ray_too_and_still_stops_in_order(tmp_path: Path) -> None:
    """A terminal signals the whole process group. Would be wrong: Ray's own handler, or Ray's processes that die of it
    before the checkpoint; a rank that never hears of the request; chatter on the terminal, files at home, leftovers."""
    with start_driver("until_stopped", "", tmp_path) as driver:
        assert driver.stdout is not None
        lines = []
        for line in driver.stdout:
            lines.append(line.strip())
            if lines.count("event training") == 1 and line == "event training\n":
                os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(timeout=20) == 130

    session, *rest = lines
    assert rest[-1] == "result {'seen': [True, True]}"
    # Both ranks trained, and the user was told once (a note, which has no name) that the run stops.
    assert sorted(rest[:-1]) == ["event None", "event training", "event training"]
    assert not Path(session.split()[1]).exists()
    assert not list(tmp_path.iterdir())


def test_sigkill_of_the_driver_leaves_nothing_and_touches_nobody_else(tmp_path: Path) -> None:
    """Would be wrong: agents that live on for a minute, workers that train on unseen, another user's Ray killed."""
    decoy = subprocess.Popen(["sleep", "60"], env={reaper_name(): "0" * 32})
    with (
        start_driver("until_stopped", "", tmp_path) as driver,
        start_driver("until_stopped", "", tmp_path) as foreign,
    ):
        assert driver.stdout is not None
        assert foreign.stdout is not None
        session = driver.stdout.readline().split()[1]
        while "training" not in driver.stdout.readline():
            pass
        marker = marker_of_child(driver.pid)
        assert len(reaper.marked(marker)) >= 6  # GCS, raylet, two agents, controller, two workers: the test looks right

        os.kill(driver.pid, signal.SIGKILL)

        wait_for(lambda: not reaper.marked(marker) and not Path(session).exists(), 10, lambda: reaper.marked(marker))
        assert decoy.poll() is None
        while "training" not in foreign.stdout.readline():
            pass
        os.killpg(foreign.pid, signal.SIGTERM)
        assert "result {'seen': [True, True]}" in foreign.stdout.read()
        assert foreign.wait(timeout=20) == 130
    decoy.kill()
    decoy.wait()


@pytest.mark.parametrize(("process", "named"), [("gcs_server", "gcs_server"), ("ray::TrainController", "controller")])
def test_a_run_whose_supervision_dies_ends_and_says_so(tmp_path: Path, process: str, named: str) -> None:
    """Would be wrong: a command that hangs for ever (Ray itself waits a minute for its GCS, then kills the driver)."""
    with start_driver("until_stopped", "deaf", tmp_path) as driver:
        assert driver.stdout is not None
        session = driver.stdout.readline().split()[1]
        while "training" not in driver.stdout.readline():
            pass
        for pid in reaper.marked(marker_of_child(driver.pid)):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if Path(program).name.startswith(process):
                os.kill(pid, signal.SIGKILL)
        output = driver.communicate(timeout=30)[0]

    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith("launcher.errors.WorkerLost: ")
    assert named in last_line
    assert "run.resume=true" in last_line
    assert driver.returncode == 1
    wait_for(lambda: not Path(session).exists(), 10, session)


def reaper_name() -> str:
    from launcher.clusters.local.embedded_ray import MARKER

    return MARKER


def marker_of_child(driver: int) -> str:
    """Return the marker that the children of a driver carry."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            entries = Path(f"/proc/{name}/environ").read_text().split("\0")
        except OSError:
            continue
        for entry in entries:
            if parent == driver and entry.startswith(reaper_name() + "="):
                return entry
    raise AssertionError("no child of the driver carries a marker")
