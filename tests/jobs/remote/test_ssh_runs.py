"""Runs on SSH hosts: the command runs on a laptop, the driver on the head, and the files are copied."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Place
from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.ssh_lab import SshLab, processes_left, seen_everywhere, temporary_files_left
from tests.support.waiting import wait_for

TINY = ("experiment=mnist_tiny", "logging.graph=false", "trainer.deterministic=true")
LONG = ("--config-dir", "own", "experiment=toy", "trainer.steps=1000000", "checkpoint.every=200")


def result(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "result.json").read_text())
    return found


def wait_until(
    ssh_machines: SshLab, driver: subprocess.Popen[bytes], run: Path, step: int, seconds: float = 60
) -> None:
    """Wait until the laptop's copy of the run has logged a step."""

    def has_step() -> bool:
        assert driver.poll() is None, ssh_machines.laptop.log()[-3000:]
        metrics = run / "metrics.jsonl"
        return metrics.exists() and f'"step": {step}' in metrics.read_text()

    wait_for(has_step, seconds, lambda: ssh_machines.laptop.log()[-3000:])


@pytest.mark.parametrize("ssh_machines", [(3, None, True)], indirect=True)
def test_a_run_on_hosts_equals_a_local_run_even_if_a_machine_is_lost(ssh_machines: SshLab, here: Place) -> None:
    """One worker on each host, whose homes have other paths; the metrics, checkpoints and logs are on the laptop; no
    secret is visible."""
    job = ("--config-dir", "own", "experiment=toy", "trainer.deterministic=true", "run.name=two", "checkpoint.every=4")
    planted = "pl4nted-" + "5ec7e7"
    one_a_host = ("scaling.workers=2", "scaling.cpus_per_worker=2", "cluster.env=[PLANTED]")
    runs = ssh_machines.calling / "runs"
    words = (*job, *ssh_machines.words(), *one_a_host, "model.delay=0.2")
    done = ssh_machines.launch(*words, PLANTED=planted, seconds=180)
    assert (done.status, done.last) == (0, str(runs / "two")), done.err
    found = result(runs / "two")
    assert (found["status"], found["workers"], found["steps"]) == ("completed", 2, 8)
    assert found["checkpoint"] == str(runs / "two" / "checkpoints" / "step-00000008")
    assert any((runs / "two").glob("events.out.tfevents*"))
    assert "step 8/8" in done.err
    assert here.here(*job).status == 0
    assert_same_weights(final_weights(here.runs / "two"), final_weights(runs / "two"))
    assert ssh_machines.launch("plan", "run.like=two", "run.name=like", seconds=60).status == 0
    evaluated = ssh_machines.launch("evaluate", "two", seconds=100)
    assert evaluated.status == 0, evaluated.err

    training = ssh_machines.start(*words, "run.resume=true", "trainer.steps=1000000", PLANTED=planted)
    wait_until(ssh_machines, training, runs / "two", 14, 120)
    assert seen_everywhere(ssh_machines, planted, environments=False) == []
    lost = next(host for host in ssh_machines.machines[1:] if host.find("RayTrainWorker"))
    lost.kill()
    log = ssh_machines.laptop.log
    wait_for(lambda: "step " in log().partition("(failure 1")[2], 150, lambda: log()[-3000:])  # the next group trains
    stopped = ssh_machines.launch("stop", "two", seconds=100)
    assert stopped.status == 0, stopped.err
    assert training.wait(240) == 0, log()[-3000:]
    assert "Continuing from step 8." in log()
    found = result(runs / "two")
    assert (found["status"], found["restarts"], found["workers"]) == ("stopped", 2, 2)  # run.resume and the loss
    assert here.here(*job, "run.resume=true", f"trainer.steps={found['steps']}").status == 0
    assert_same_weights(final_weights(here.runs / "two"), final_weights(runs / "two"))

    def notes() -> list[str]:
        (cluster,) = json.loads(ssh_machines.launch("status", "--json").out)
        return list(cluster["notes"])

    # Ray declares a node lost late: the run may have ended by then.
    wait_for(lambda: any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), 60, "Ray lost no node")
    assert any(f"{lost.name} refuses connections" in note for note in notes())
    done = ssh_machines.launch("up", *ssh_machines.words())
    assert f"{lost.name} is left out" in done.err
    assert any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), "its name is missing"

    ssh_machines.start_sshd(lost)
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0
    assert processes_left(ssh_machines) == {}
    assert temporary_files_left(ssh_machines) == {}, "also of killed workers and of the machine that was lost"
    assert seen_everywhere(ssh_machines, planted) == []
    shown = ssh_machines.launch("logs", "two", "--no-follow", seconds=60)
    assert (shown.status, shown.out) == (0, (runs / "two" / "log.txt").read_text()), shown.err
    assert [line for line in shown.out.splitlines() if "stopped after" in line][-1].endswith(f"{found['steps']} steps")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_logs_of_ten_detached_runs_are_complete_on_whichever_host_rank_0_is(ssh_machines: SshLab) -> None:
    """Ray may place rank 0 on the driver's machine or on another."""
    on_one_host_each = ("scaling.workers=2", "scaling.cpus_per_worker=2", "cluster.detach=true")
    ranks_0 = set()
    for number in range(20):
        run = ssh_machines.calling / "runs" / f"n{number}"
        sent = ssh_machines.launch(*TINY, *ssh_machines.words(), *on_one_host_each, f"run.name={run.name}", seconds=120)
        assert sent.status == 0, sent.err
        followed = ssh_machines.launch("logs", run.name, seconds=120)
        assert followed.status == 0, followed.err
        assert result(run)["status"] == "completed"
        lines = [line for line in (run / "log.txt").read_text().splitlines() if "[rank 0]" in line]
        steps = [line.partition("] step ")[2].partition("/")[0] for line in lines if "] step " in line]
        assert steps == sorted(steps, key=int), lines
        assert (steps[-1], lines[-1].endswith("completed after 10 steps")) == ("10", True), lines
        assert followed.out.splitlines()[-1] == lines[-1]
        (other,) = {path.stem.removeprefix("log-") for path in run.glob("log-*.txt")}
        ranks_0 |= {host.name for host in ssh_machines.machines} - {other}
        if number >= 9 and len(ranks_0) == 2:
            break
    else:
        pytest.fail(f"rank 0 was always on {ranks_0}")
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
def test_a_run_continues_without_the_laptop(ssh_machines: SshLab) -> None:
    run = ssh_machines.calling / "runs" / "away"
    laptop = ssh_machines.start(
        *LONG, *ssh_machines.words(ssh_machines.machines[0].name), "cluster=ssh", "run.name=away"
    )
    wait_until(ssh_machines, laptop, run, 4, 120)
    ssh_machines.laptop.cut()
    time.sleep(3)
    ssh_machines.laptop.restore_link()
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait(240)
    before = len((run / "metrics.jsonl").read_text())
    long_ago = time.time() - 1000  # as if the laptop had been away for longer than a run may be silent
    os.utime(run / ".heartbeat", (long_ago, long_ago))
    again = ssh_machines.launch("run.name=away", "run.resume=true", seconds=60)
    assert (again.status, "is running on ssh" in again.err) == (2, True), again.err
    listed = ssh_machines.launch("logs", "away", "--no-follow", seconds=60)
    assert listed.status == 0, listed.err
    assert len((run / "metrics.jsonl").read_text()) > before, "the run has not continued"
    stopped = ssh_machines.launch("stop", "away", seconds=100)
    assert stopped.status == 0, stopped.err
    found = result(run)
    assert found["status"] == "stopped"
    assert Path(str(found["checkpoint"])).is_dir()
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0


def number_of_the_best(sweep: Path) -> int:
    found: Any = result(sweep)["best"]
    return int(found["trial"])


@pytest.mark.slow
def test_a_sweep_on_two_hosts_equals_a_local_sweep(ssh_machines: SshLab) -> None:
    """Each trial has one worker per host, the hosts share no disk, and the laptop is disconnected during the sweep."""
    words = ssh_machines.words()
    swept = ("-m", *TINY, "optimizer.lr=1e-3,3e-3,1e-2", "trainer.epochs=12", "checkpoint.every=5", "scaling.workers=2")
    sweep = ssh_machines.calling / "runs" / "grid"
    laptop = ssh_machines.start(*swept, *words, "run.name=grid")
    latest = time.monotonic() + 240
    while "trial 0 completed" not in ssh_machines.laptop.log():
        assert time.monotonic() < latest, ssh_machines.laptop.log()[-3000:]
        time.sleep(0.5)
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait(240)
    stopped = ssh_machines.launch("stop", "grid", seconds=100)
    assert stopped.status == 0, stopped.err
    assert result(sweep)["status"] == "stopped"
    done = ssh_machines.launch("-m", "run.name=grid", "run.resume=true", seconds=200)
    assert (done.status, done.last) == (0, str(sweep)), done.err

    alone = ssh_machines.launch(*swept[:-1], "run.name=here", "cluster=none", seconds=100)
    assert alone.status == 0, alone.err
    for number in range(3):
        found = result(sweep / str(number))
        assert (found["status"], found["workers"], found["steps"]) == ("completed", 2, 120)
        assert found["checkpoint"] == str(sweep / str(number) / "checkpoints" / "step-00000120")
        assert any((sweep / str(number)).glob("events.out.tfevents*"))
        assert_same_weights(final_weights(sweep.with_name("here") / str(number)), final_weights(sweep / str(number)))
    evaluated = ssh_machines.launch("evaluate", "grid/best", seconds=100)
    assert evaluated.status == 0, evaluated.err
    copies = [
        path
        for host in ssh_machines.machines
        for path in ssh_machines.own(host).glob(".cache/launch/**/step-*/manifest.json")
    ]
    assert copies == [], "checkpoints of trials that have ended fill the disks of the hosts"
    more = ("run.like=grid/best", "checkpoint.load=grid/best", "optimizer.lr=1e-9", "trainer.epochs=1", "run.name=more")
    begun = ssh_machines.launch(*more, seconds=100)
    assert begun.status == 0, begun.err
    best: Any = result(sweep / str(number_of_the_best(sweep)))["best"]
    metrics: Any = result(sweep.with_name("more"))["metrics"]
    assert abs(metrics["val/loss"] - best["value"]) < 1e-3
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
def test_one_trial_of_a_remote_sweep_is_followed_and_stopped(ssh_machines: SshLab) -> None:
    """First the trial is stopped by its name, then the sweep."""
    words = ssh_machines.words(ssh_machines.machines[0].name)
    swept = ("-m", *LONG, *words, "cluster=ssh", "optimizer.lr=0.1,0.2", "scaling.workers=1", "cluster.detach=true")
    sent = ssh_machines.launch(*swept, "sweep.concurrency=1", "run.name=night", seconds=100)
    assert sent.status == 0, sent.err
    assert "launch logs night" in sent.err
    sweep = ssh_machines.calling / "runs" / "night"
    latest = time.monotonic() + 240
    while not (sweep / "0" / "metrics.jsonl").exists():
        assert time.monotonic() < latest, ssh_machines.launch("logs", "night", "--no-follow").err
        ssh_machines.launch("logs", "night", "--no-follow", seconds=60)
        time.sleep(1)
    shown = ssh_machines.launch("logs", "night/0", "--no-follow", seconds=60)
    assert (shown.status, "step" in shown.out) == (0, True), shown.err
    stopped = ssh_machines.launch("stop", "night/0", seconds=100)
    assert (stopped.status, "0 is stopped at step" in stopped.err) == (0, True), stopped.err
    ended = ssh_machines.launch("stop", "night", seconds=100)
    assert ended.status == 0, ended.err
    assert [result(sweep / name)["status"] for name in (".", "0")] == ["stopped", "stopped"]
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0


@pytest.mark.slow
def test_no_trial_fails_with_a_machine_that_is_lost(ssh_machines: SshLab) -> None:
    """Ray treats the machine as alive for a minute; trials must not wait for it."""
    swept = ("-m", *TINY, "optimizer.lr=1e-3,2e-3,3e-3,1e-2", "trainer.epochs=40", "checkpoint.every=20")
    one_a_host = ("scaling.workers=1", "scaling.cpus_per_worker=2")
    sweep = ssh_machines.calling / "runs" / "lossy"
    driver = ssh_machines.start(*swept, *one_a_host, *ssh_machines.words(), "run.name=lossy")
    wait_until(ssh_machines, driver, sweep / "1", 40, 150)
    ssh_machines.machines[1].kill()
    assert driver.wait(240) == 0, ssh_machines.laptop.log()[-3000:]
    assert "It resumes (consecutive failure 1" in ssh_machines.laptop.log()
    alone = ssh_machines.launch(*swept, "run.name=here", "cluster=none", seconds=100)
    assert alone.status == 0, alone.err
    for number in range(4):
        assert result(sweep / str(number))["status"] == "completed"
        assert_same_weights(final_weights(sweep.with_name("here") / str(number)), final_weights(sweep / str(number)))
