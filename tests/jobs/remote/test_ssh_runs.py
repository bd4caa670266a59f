"""Runs on a cluster of SSH hosts: the command on a laptop, the driver on the head, the files on both."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Result
from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.elsewhere import Elsewhere
from tests.support.waiting import wait_for

TINY = ("experiment=mnist_tiny", "logging.graph=false", "trainer.deterministic=true")
LONG = ("--config-dir", "own", "experiment=toy", "trainer.steps=1000000", "checkpoint.every=200")


def result(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "result.json").read_text())
    return found


def wait_until(there: Elsewhere, run: Path, step: int, seconds: float = 60) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and f'"step": {step}' in metrics.read_text(),
        seconds,
        lambda: there.laptop.log()[-3000:],
    )


@pytest.mark.timeout(900)
def test_a_run_on_two_hosts_is_as_one_here(there: Elsewhere) -> None:
    words = there.words()
    done = there.launch(*TINY, *words, "run.name=two", "checkpoint.every=5", PLANTED="sEcReT-94", seconds=180)
    assert done.status == 0, done.err
    runs = there.calling / "runs"
    assert done.last == str(runs / "two")
    found = result(runs / "two")
    assert (found["status"], found["workers"], found["steps"]) == ("completed", 2, 10)
    assert found["checkpoint"] == str(runs / "two" / "checkpoints" / "step-00000010")
    assert any((runs / "two").glob("events.out.tfevents*"))
    assert "step 10/10" in done.err
    for kind in (["cluster=none"], ["cluster=local", "scaling.workers=2", "scaling.cpus_per_worker=0.5"]):
        alone: Result = there.launch(*TINY, *kind)
        assert alone.status == 0, alone.err
        assert_same_weights(final_weights(Path(alone.last)), final_weights(runs / "two"))
    evaluated = there.launch("evaluate", "two", "data=mnist", seconds=100)
    assert evaluated.status == 0, evaluated.err

    again = there.launch(*TINY, *words, "run.name=two", "run.resume=true", "trainer.epochs=2", seconds=120)
    assert again.status == 0, again.err
    assert "Continuing from step 10." in again.err
    assert result(runs / "two")["steps"] == 20
    like = there.launch("run.like=two", *words, "run.name=like", "trainer.epochs=1", seconds=120)
    assert (like.status, like.last) == (0, str(runs / "like")), like.err
    assert there.launch("down", "ssh", seconds=60).status == 0
    log = there.launch("logs", "two", "--no-follow", seconds=60)
    assert (log.status, log.out) == (0, (runs / "two" / "log.txt").read_text()), log.err
    assert [line for line in log.out.splitlines() if "completed after" in line][-1].endswith("20 steps")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_log_of_a_detached_run_is_whole_wherever_rank_0_is(there: Elsewhere) -> None:
    """Would be wrong: a log that is lost when rank 0 is on another machine than the driver, which Ray decides."""
    on_one_host_each = ("scaling.workers=2", "scaling.cpus_per_worker=2", "cluster.detach=true")
    ranks_0 = set()
    for number in range(12):
        run = there.calling / "runs" / f"n{number}"
        sent = there.launch(*TINY, *there.words(), *on_one_host_each, f"run.name={run.name}", seconds=120)
        assert sent.status == 0, sent.err
        followed = there.launch("logs", run.name, seconds=120)
        assert followed.status == 0, followed.err
        assert result(run)["status"] == "completed"
        lines = [line for line in (run / "log.txt").read_text().splitlines() if "[rank 0]" in line]
        steps = [line.partition("] step ")[2].partition("/")[0] for line in lines if "] step " in line]
        assert steps == sorted(steps, key=int), lines
        assert (steps[-1], lines[-1].endswith("completed after 10 steps")) == ("10", True), lines
        assert followed.out.splitlines()[-1] == lines[-1]
        (other,) = {path.stem.removeprefix("log-") for path in run.glob("log-*.txt")}
        ranks_0 |= {host.name for host in there.machines} - {other}
        if len(ranks_0) == 2:
            break
    else:
        pytest.fail(f"rank 0 was always on {ranks_0}")
    assert there.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_laptop_that_goes_away_leaves_the_run_going(there: Elsewhere) -> None:
    run = there.calling / "runs" / "away"
    laptop = there.start(*LONG, *there.words(there.machines[0].name), "cluster=ssh", "run.name=away")
    wait_until(there, run, 4, 120)
    there.laptop.cut()
    time.sleep(3)
    there.laptop.mend()
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait(10)
    before = len((run / "metrics.jsonl").read_text())
    long_ago = time.time() - 1000  # as if the laptop had been away for longer than a run may be silent
    os.utime(run / ".heartbeat", (long_ago, long_ago))
    again = there.launch("run.name=away", "run.resume=true", seconds=60)
    assert (again.status, "is running on ssh" in again.err) == (2, True), again.err
    listed = there.launch("logs", "away", "--no-follow", seconds=60)
    assert listed.status == 0, listed.err
    assert len((run / "metrics.jsonl").read_text()) > before, "the run has not gone on"
    stopped = there.launch("stop", "away", seconds=100)
    assert stopped.status == 0, stopped.err
    found = result(run)
    assert found["status"] == "stopped"
    assert Path(str(found["checkpoint"])).is_dir()
    assert there.launch("down", "ssh", seconds=60).status == 0


def number_of_the_best(sweep: Path) -> int:
    found: Any = result(sweep)["best"]
    return int(found["trial"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_two_hosts_is_as_one_here(there: Elsewhere) -> None:
    """Trials of two workers, one a host, and no disk that both see; the laptop goes away meanwhile."""
    words = there.words()
    swept = ("-m", *TINY, "optimizer.lr=1e-3,3e-3,1e-2", "trainer.epochs=12", "checkpoint.every=5", "scaling.workers=2")
    sweep = there.calling / "runs" / "grid"
    laptop = there.start(*swept, *words, "run.name=grid")
    latest = time.monotonic() + 150
    while "trial 0 completed" not in there.laptop.log():
        assert time.monotonic() < latest, there.laptop.log()[-3000:]
        time.sleep(0.5)
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait(10)
    stopped = there.launch("stop", "grid", seconds=100)
    assert stopped.status == 0, stopped.err
    assert result(sweep)["status"] == "stopped"
    done = there.launch("-m", "run.name=grid", "run.resume=true", seconds=200)
    assert (done.status, done.last) == (0, str(sweep)), done.err

    alone = there.launch(*swept[:-1], "run.name=here", "cluster=none", seconds=100)
    assert alone.status == 0, alone.err
    for number in range(3):
        found = result(sweep / str(number))
        assert (found["status"], found["workers"], found["steps"]) == ("completed", 2, 120)
        assert found["checkpoint"] == str(sweep / str(number) / "checkpoints" / "step-00000120")
        assert any((sweep / str(number)).glob("events.out.tfevents*"))
        assert_same_weights(final_weights(sweep.with_name("here") / str(number)), final_weights(sweep / str(number)))
    evaluated = there.launch("evaluate", "grid/best", seconds=100)
    assert evaluated.status == 0, evaluated.err
    copies = [path for host in there.machines for path in there.own(host).glob(".cache/launch/**/step-*/manifest.json")]
    assert copies == [], "checkpoints of trials that have ended fill the disks of the hosts"
    more = ("run.like=grid/best", "checkpoint.load=grid/best", "optimizer.lr=1e-9", "trainer.epochs=1", "run.name=more")
    begun = there.launch(*more, seconds=100)
    assert begun.status == 0, begun.err
    best: Any = result(sweep / str(number_of_the_best(sweep)))["best"]
    metrics: Any = result(sweep.with_name("more"))["metrics"]
    assert abs(metrics["val/loss"] - best["value"]) < 1e-3
    assert there.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_trial_of_a_sweep_elsewhere_is_followed_and_stopped(there: Elsewhere) -> None:
    """Detached, by names: of the trial, which ends as far as it came, and then of the sweep."""
    words = there.words(there.machines[0].name)
    swept = ("-m", *LONG, *words, "cluster=ssh", "optimizer.lr=0.1,0.2", "scaling.workers=1", "cluster.detach=true")
    sent = there.launch(*swept, "sweep.concurrency=1", "run.name=night", seconds=100)
    assert sent.status == 0, sent.err
    assert "launch logs night" in sent.err
    sweep = there.calling / "runs" / "night"
    latest = time.monotonic() + 90
    while not (sweep / "0" / "metrics.jsonl").exists():
        assert time.monotonic() < latest, there.launch("logs", "night", "--no-follow").err
        there.launch("logs", "night", "--no-follow", seconds=60)
        time.sleep(1)
    shown = there.launch("logs", "night/0", "--no-follow", seconds=60)
    assert (shown.status, "step" in shown.out) == (0, True), shown.err
    stopped = there.launch("stop", "night/0", seconds=100)
    assert (stopped.status, "0 is stopped at step" in stopped.err) == (0, True), stopped.err
    ended = there.launch("stop", "night", seconds=100)
    assert ended.status == 0, ended.err
    assert [result(sweep / name)["status"] for name in (".", "0")] == ["stopped", "stopped"]
    assert there.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_machine_lost_during_a_sweep_costs_no_trial(there: Elsewhere) -> None:
    """Would be wrong: a trial that fails with its machine, or that waits for one that Ray still believes in."""
    swept = ("-m", *TINY, "optimizer.lr=1e-3,2e-3,3e-3,1e-2", "trainer.epochs=40", "checkpoint.every=20")
    one_a_host = ("scaling.workers=1", "scaling.cpus_per_worker=2")
    sweep = there.calling / "runs" / "lossy"
    driver = there.start(*swept, *one_a_host, *there.words(), "run.name=lossy")
    wait_until(there, sweep / "1", 40, 150)
    there.machines[1].kill()
    assert driver.wait(200) == 0, there.laptop.log()[-3000:]
    assert "It is continued (failure 1" in there.laptop.log()
    alone = there.launch(*swept, "run.name=here", "cluster=none", seconds=100)
    assert alone.status == 0, alone.err
    for number in range(4):
        assert result(sweep / str(number))["status"] == "completed"
        assert_same_weights(final_weights(sweep.with_name("here") / str(number)), final_weights(sweep / str(number)))
