"""Stopping a run: Ctrl-C, SIGTERM, `launch stop`, and a killed process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import TOY, Place, Running

LONG = (*TOY, "trainer.epochs=1000", "model.delay=0.1", "logging.tensorboard=false", "run.name=a")


def has_steps(place: Place, at_least: int = 3) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return int((place.runs / "a/.step").read_text()) >= at_least
        except (OSError, ValueError):
            return False

    return check


@pytest.fixture
def running(place: Place) -> Iterator[Running]:
    """Start a long run in one process, and wait for its first steps."""
    started = place.start(*LONG)
    try:
        started.wait_until(has_steps(place))
        yield started
    finally:
        started.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_saves_and_stops(place: Place, running: Running, number: signal.Signals, status: int) -> None:
    running.signal(number)
    done = running.finish(20)
    assert (done.status, done.out) == (status, f"{place.runs / 'a'}\n")
    result = place.result("a")
    assert (result["status"], result["reason"], result["error"]) == ("stopped", "signal", None)
    assert result["checkpoint"].endswith(f"step-{result['steps']:08}")
    assert Path(result["checkpoint"]).is_dir()
    assert "Stopping: the run saves a checkpoint first." in done.err
    assert f"stopped after {result['steps']} steps" in done.err
    assert "Traceback" not in done.err
    assert "Continue it with: launch run.name=a run.resume=true" in done.err.splitlines()[-1]
    assert place.files() == {"runs", "runs/a"}
    assert not os.listdir(place.home)


def test_two_signals_stop_at_once(place: Place, request: pytest.FixtureRequest) -> None:
    """The second signal arrives during a step that takes longer than the limit of the test."""
    running = place.start(*LONG[:-1], "run.name=a", "model.delay=3600")
    request.addfinalizer(running.close)
    running.wait_until(lambda: (place.runs / "a/log.txt").exists() and (place.runs / "a/.step").exists())
    time.sleep(0.5)
    running.signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.process.poll() is None, "the first one waits for the step"
    running.signal(signal.SIGINT)
    done = running.finish()
    assert done.status == 130
    assert "Traceback" not in done.err
    assert (place.result("a")["status"], place.result("a")["reason"]) == ("stopped", "signal")


def test_before_training_one_signal_is_enough(place: Place, request: pytest.FixtureRequest) -> None:
    running = place.start(*LONG, "data.seconds=60")
    request.addfinalizer(running.close)
    time.sleep(4)
    running.signal(signal.SIGTERM)
    done = running.finish(10)
    assert done.status in (143, -signal.SIGTERM)
    assert "Traceback" not in done.err
    assert done.out == ""
    assert place.files() == set()


def test_launch_stop_from_another_process(place: Place, running: Running) -> None:
    """`launch logs` follows the run meanwhile, and exits when the run ends."""
    follower = place.start("logs", "a")
    shown = json.loads(place.launch("runs", "--json").out)
    assert [(run["name"], run["status"], run["workers"]) for run in shown] == [("a", "running", 1)]
    refused = place.launch(*TOY, "run.name=a", "run.resume=true")
    assert refused.status == 2
    assert "is running" in refused.err
    answer = place.launch("stop", "a")
    assert (answer.status, answer.out) == (0, f"{place.runs / 'a'}\n")
    assert "a is stopped at step" in answer.err
    done = running.finish(10)
    assert done.status == 0
    result = place.result("a")
    assert (result["status"], result["reason"]) == ("stopped", "request")
    followed = follower.finish(10)
    assert followed.status == 0
    assert followed.out.endswith(f"stopped after {result['steps']} steps\n")
    again = place.launch("stop", "a")
    assert again.status == 2
    assert "not running: it is stopped" in again.err
    resumed = place.launch("run.name=a", "run.resume=true", f"trainer.steps={result['steps'] + 1}", "model.delay=0.1")
    assert resumed.status == 0, resumed.err


def test_a_killed_run_is_lost_and_can_be_resumed(place: Place, running: Running) -> None:
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    [row] = json.loads(place.launch("runs", "--json").out)
    assert row["status"] == "lost"
    refused = place.launch("stop", "a")
    assert refused.status == 2
    assert "run.resume=true" in refused.err
    done = place.launch("run.name=a", "run.resume=true", "trainer.steps=8")
    assert done.status == 0, done.err
    assert place.result("a")["status"] == "completed"
    assert place.result("a")["restarts"] == 1


# ---- under Ray ------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_a_terminal_under_ray(place: Place, request: pytest.FixtureRequest) -> None:
    """The terminal signals all foreground processes. Those of Ray are in another session and are stopped in order."""
    running = place.start(*LONG, "cluster=local", terminal=True)
    request.addfinalizer(running.close)
    running.wait_until(has_steps(place), 90)
    running.type("\x03")
    done = running.finish(30)
    assert (done.status, done.out) == (130, f"{place.runs / 'a'}\n")
    result = place.result("a")
    assert (result["status"], result["workers"]) == ("stopped", 2)
    assert Path(result["checkpoint"]).is_dir()
    assert result["checkpoint"].endswith(f"{result['steps']:08}")
    assert "2 CPU workers" in running.plain
    assert "Stopping: the run saves a checkpoint first." in running.plain
    for chatter in ("raylet", "INFO", "WARNING", "Warning", "Traceback", "pid="):
        assert chatter not in done.err
    assert place.files() == {"runs", "runs/a"}
    assert not os.listdir(place.home)


@pytest.mark.slow
def test_two_signals_under_ray_stop_at_once(place: Place, request: pytest.FixtureRequest) -> None:
    running = place.start(*LONG, "cluster=local", "model.delay=3600")
    request.addfinalizer(running.close)
    running.wait_until(lambda: (place.runs / "a/.step").exists(), 90)
    time.sleep(1)
    running.signal(signal.SIGTERM)
    time.sleep(1)
    running.signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 143
    assert place.result("a")["status"] == "stopped"
    assert "Traceback" not in done.err
