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
from launcher.clusters.local.embedded_ray import MARKER, EmbeddedRay
from launcher.errors import DataError, LaunchError, LoaderLost, NonFiniteLoss, Stopped, UserCodeError, WorkerLost
from launcher.runners import worker_errors
from launcher.runners.signals import Interrupts
from launcher.runners.supervision import Limits, explain, restart_note
from tests.support.waiting import wait_for

CPUS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedRay]:
    with EmbeddedRay(CPUS, 0, preload=("launcher.runners.ray_train",)) as embedded:
        yield embedded


def run(
    cluster: EmbeddedRay,
    job: str,
    note: str = "",
    workers: int = 2,
    events: list | None = None,
    timeout: float = 120.0,
) -> dict[str, Any]:
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
            limits=ray_train.Limits(timeout=timeout),
        )


def test_one_signal_is_enough_before_training(cluster: EmbeddedRay) -> None:
    """There is nothing to save. The tests below need the same CPUs, so they show that the run has released them."""
    sent = _send_when_training(signal.SIGINT)

    with pytest.raises(Stopped):
        run(cluster, "until_stopped", "never trains", events=sent)


def test_a_second_signal_stops_at_once(cluster: EmbeddedRay) -> None:
    sent = _send_when_training(signal.SIGTERM, times=2)

    with pytest.raises(Stopped) as caught:
        run(cluster, "until_stopped", "deaf", events=sent)

    assert caught.value.signal_number == signal.SIGTERM
    assert time.monotonic() - sent.begun < 50, "the task takes a minute"


def test_workers_with_fractions_of_a_cpu_on_an_existing_ray(cluster: EmbeddedRay) -> None:
    """Guards against: duplicate ranks, events that are lost or out of order, another working directory, and code that
    only works on an embedded Ray, not on the Ray of a notebook."""
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


def test_an_exception_on_one_rank_is_raised_in_the_driver(cluster: EmbeddedRay) -> None:
    """Guards against: a wrapper of Ray, or broken connections of other ranks, reported instead of the cause."""
    begun = time.monotonic()

    with pytest.raises(UserCodeError) as caught:
        run(cluster, "fail_on_one_rank", timeout=600.0)

    assert str(caught.value) == "ZeroDivisionError: mine"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "in fail_on_one_rank\n" in caught.value.traceback_text
    assert "ZeroDivisionError: mine" in caught.value.traceback_text
    assert "ray/" not in caught.value.traceback_text
    assert "runners/ray_train.py" not in caught.value.traceback_text
    assert time.monotonic() - begun < 400, "the others waited until their collective timed out"


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
def test_errors_are_encoded_and_decoded(error: LaunchError) -> None:
    arrived = worker_errors.rebuild(json.loads(json.dumps(worker_errors.describe(error, rank=1))))

    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert getattr(arrived, "traceback_text", "") == getattr(error, "traceback_text", "")


def test_a_dead_loader_process_is_a_cause_and_not_a_consequence() -> None:
    """Guards against: no restart, or broken connections of other ranks reported as the cause."""
    lost, gone = (
        worker_errors.describe(error, 0) for error in (LoaderLost("a loader process was killed"), WorkerLost("gone"))
    )
    assert (lost["lost"], lost["aftermath"]) == (True, False)
    assert (gone["lost"], gone["aftermath"]) == (False, True)
    error = explain(RuntimeError(), {}, [gone, lost | {"time": gone["time"] + 1}])
    assert isinstance(error, LoaderLost)
    verdict = {"cause": "failure", "count": 1, "most": 3}
    note = restart_note(verdict, {}, {}, Limits(), [gone, lost])
    assert note.startswith("a loader process was killed. ")


def test_ray_data_reads_a_stream_while_the_workers_reserve_all_cpus(cluster: EmbeddedRay, tmp_path: Path) -> None:
    """Guards against: lost or duplicate rows, another order than without Ray, a deadlock of tasks that wait for a CPU,
    and a missing file reported as an error of Ray."""
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


@pytest.mark.parametrize(
    ("number", "how"), [("SIGKILL", "died without an error message"), ("SIGSEGV", r"crashed.*\(SIGSEGV\)")]
)
def test_a_worker_that_dies_is_named(cluster: EmbeddedRay, number: str, how: str) -> None:
    """Guards against: the lost connection of another rank reported as the cause, and an endless wait."""
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


# ---- drivers in other processes -------------------------------------------------------------------------------------


def start_driver(job: str, note: str, home: Path) -> subprocess.Popen[str]:
    """Start a driver in a new session and process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, str(Path(HERE) / "ray_jobs.py"), job, note],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(Path(HERE).parents[1])},
    )


@pytest.mark.slow  # tests/test_interrupts.py presses Ctrl-C under Ray in every run of the suite
def test_ctrl_c_in_a_terminal_stops_gracefully(tmp_path: Path) -> None:
    """A terminal signals the whole process group. Guards against: Ray's own signal handler, Ray's processes that die
    before the checkpoint, a rank without the request, other output, and files or processes that are left."""
    with start_driver("until_stopped", "", tmp_path) as driver:
        assert driver.stdout is not None
        lines = []
        for line in driver.stdout:
            lines.append(line.strip())
            if lines.count("event training") == 1 and line == "event training\n":
                os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(timeout=240) == 130

    session, *rest = lines
    assert rest[-1] == "result {'seen': [True, True]}"
    # Both ranks trained, and one note (an event without a name) reported the stop.
    assert sorted(rest[:-1]) == ["event None", "event training", "event training"]
    assert not Path(session.split()[1]).exists()
    assert not list(tmp_path.iterdir())


def test_sigkill_of_the_driver_kills_its_processes_and_no_others(tmp_path: Path) -> None:
    """Guards against: agents or workers that continue to run, and another Ray that is killed."""
    decoy = subprocess.Popen(["sleep", "60"], env={MARKER: "0" * 32})
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
        assert len(reaper.marked(marker)) >= 6  # GCS, raylet, two agents, controller, two workers

        os.kill(driver.pid, signal.SIGKILL)

        wait_for(lambda: not reaper.marked(marker) and not Path(session).exists(), 10, lambda: reaper.marked(marker))
        assert decoy.poll() is None
        while "training" not in foreign.stdout.readline():
            pass
        os.killpg(foreign.pid, signal.SIGTERM)
        assert "result {'seen': [True, True]}" in foreign.stdout.read()
        assert foreign.wait(timeout=240) == 130
    decoy.kill()
    decoy.wait()


@pytest.mark.parametrize(("process", "named"), [("gcs_server", "gcs_server"), ("ray::TrainController", "controller")])
def test_the_loss_of_a_process_of_ray_ends_the_run_with_an_error(tmp_path: Path, process: str, named: str) -> None:
    """Guards against: a command that hangs (Ray itself waits for its GCS for a minute, then kills the driver)."""
    with start_driver("until_stopped", "deaf", tmp_path) as driver:
        assert driver.stdout is not None
        session = driver.stdout.readline().split()[1]
        while "training" not in driver.stdout.readline():
            pass
        for pid in reaper.marked(marker_of_child(driver.pid)):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if Path(program).name.startswith(process):
                os.kill(pid, signal.SIGKILL)
        output = driver.communicate(timeout=240)[0]

    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith("launcher.errors.WorkerLost: ")
    assert named in last_line
    assert "run.resume=true" in last_line
    assert driver.returncode == 1
    wait_for(lambda: not Path(session).exists(), 10, session)


def marker_of_child(driver: int) -> str:
    """Return the marker in the environment of the children of a driver."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            entries = Path(f"/proc/{name}/environ").read_text().split("\0")
        except OSError:
            continue
        for entry in entries:
            if parent == driver and entry.startswith(MARKER + "="):
                return entry
    raise AssertionError("no child of the driver carries a marker")
