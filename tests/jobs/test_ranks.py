"""Runs under torchrun: only rank 0 prints, and the cause of a failure is reported instead of its consequence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import TOY, Place, Result, Running

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2", "-m", "launcher")
Start = Callable[..., Running]
RUN = (*TOY, "logging.tensorboard=false", "run.name=a")


@pytest.fixture
def start(place: Place) -> Iterator[Start]:
    started: list[Running] = []

    def one(*words: str, terminal: bool = False) -> Running:
        running = place.start(*words, terminal=terminal, before=TORCHRUN, env={"OMP_NUM_THREADS": "1"})
        started.append(running)
        return running

    yield one
    for running in started:
        running.close()


def ours(result: Result) -> list[str]:
    """Return the lines before torchrun's own report about its child processes."""
    lines = [line for line in result.err.splitlines() if "torch/distributed" not in line]
    # The line number in the script depends on the installer.
    end = next((i for i, line in enumerate(lines) if re.search(r'bin/torchrun", line \d+, in <module>$', line)), None)
    return lines if end is None else lines[: end - 1]


def test_two_ranks_are_one_run(place: Place, start: Start) -> None:
    done = start(*RUN, "scaling.workers=4", "model.speak=true").finish()
    assert (done.status, done.out) == (0, f"{place.runs / 'a'}\n")
    assert os.listdir(place.runs) == ["a"]
    assert ours(done).count("scaling.workers=4 is ignored: the 2 processes that were started are the workers.") == 1
    assert sum(line.startswith("a: 2 CPU workers") for line in ours(done)) == 1
    assert sum(line.startswith("step 8/8") for line in ours(done)) == 1
    assert not any(line.startswith("[rank 1]") for line in ours(done)), "only rank 0 prints"
    assert "[rank 1] step 2 of the model" in (place.runs / "a/log.txt").read_text()
    result = place.result("a")
    assert (result["status"], result["workers"], result["samples"]) == ("completed", 2, 80)
    assert place.files() == {"runs", "runs/a"}
    assert not os.listdir(place.home)


def test_an_error_on_one_rank_is_reported_once(place: Place, start: Start) -> None:
    """Rank 0 itself only detects a closed connection."""
    done = start(*RUN, "model.failure=raise", "model.at=7", "model.rank=1").finish()
    assert done.status == 1
    assert done.out == f"{place.runs / 'a'}\n"
    shown = "\n".join(ours(done))
    assert shown.count("Traceback") == 1
    assert shown.count("in stumble") == 1
    result = place.result("a")
    assert result["status"] == "failed"
    assert result["error"] == 'UserCodeError: KeyError: "the user\'s own mistake"'


@pytest.mark.slow
def test_a_rank_that_is_killed(place: Place, start: Start) -> None:
    done = start(*RUN, "model.failure=die", "model.at=7", "model.rank=1").finish()
    assert done.status == 1
    assert any(line.startswith("launch: The connection to another worker was lost") for line in ours(done)), done.err
    assert place.result("a")["error"].startswith("WorkerLost: ")


def test_a_wrong_request_is_reported_once(place: Place, start: Start) -> None:
    done = start(*RUN, "data.bad=0").finish()
    assert done.status == 1, "torchrun's own status"
    assert [line for line in ours(done) if line] == ["launch: numbers.csv, row 0: not a number"]
    assert "exitcode  : 2" in done.err
    assert place.files() == set()


def test_ctrl_c_at_a_terminal(place: Place, start: Start) -> None:
    """Both the terminal and torchrun send a signal to every rank; it counts as one Ctrl-C."""
    running = start(*RUN, "trainer.epochs=1000", "model.delay=0.1", terminal=True)
    running.wait_until(lambda: (place.runs / "a/.step").exists() and int((place.runs / "a/.step").read_text() or 0) > 2)
    running.type("\x03")
    done = running.finish(40)
    assert done.out == f"{place.runs / 'a'}\n"
    result = place.result("a")
    assert (result["status"], result["reason"]) == ("stopped", "signal")
    assert result["checkpoint"].endswith(f"step-{result['steps']:08}")
