"""Slurm jobs: golden scripts, rejected requests, and following a job, with fakes of Slurm's programs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.base import named
from launcher.clusters.conformance import Harness, check_requests
from launcher.clusters.slurm import submission
from launcher.clusters.slurm.kind import KIND, SlurmCluster, seconds_of
from launcher.clusters.slurm.scheduler import QueueState, Scheduler, state_in
from launcher.clusters.slurm.script import SlurmJob, folder_of, slurm_job
from launcher.errors import ClusterError, ConfigError, TrainingError
from launcher.runs import RunDirectory, user_state
from tests.support.command import TOY, Place, Result

HERE = Path(__file__).resolve().parent
CASES: dict[str, dict[str, Any]] = {
    "plain": {"nodes": 2},
    "everything": {
        "nodes": 8,
        "min_nodes": 2,
        "partition": "gpu",
        "account": "vision",
        "qos": "high",
        "time_limit": "1-12:00:00",
        "gres": "gpu:a100:4",
        "constraint": "a100&ib",
        "cpus": 32,
        "requeue": True,
        "notice_seconds": 300,
        "sbatch_options": ["--mem=64G", "--exclude=n7"],
        "setup": ["module load cuda", "export NAME='two words'"],
        "env": ["HF_TOKEN"],
        "node_usd_per_hour": 3.5,
        "budget_usd": 50.0,
    },
    "short": {"nodes": 1, "time_limit": "2", "notice_seconds": 120},
}
SBATCH = ("cluster=slurm", "run.name=a1")
INVALID = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put fakes of Slurm's programs on PATH, and let the follower look often. Returns their directory."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (programs / name).symlink_to(HERE / "programs.py")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path))
    for name in ("_LOOK_SECONDS", "_QUERY_SECONDS", "_SETTLE_SECONDS"):
        monkeypatch.setattr(submission, name, 0.01)
    return tmp_path


def calls(state: Path, program: str) -> list[str]:
    file = state / "calls"
    return [line for line in file.read_text().splitlines() if line.startswith(program)] if file.exists() else []


def train(here: Place, state: Path, responses: dict[str, Any], *more: str) -> Result:
    (state / "responses").write_text(json.dumps(responses))
    return here.here(*TOY, *SBATCH, *more)


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    words = ["experiment=gpt2", "optimizer.groups=[{match: 'fc.*', lr: 1e-3}]"]
    made = slurm_job(SlurmCluster(**CASES[name]), "a1", "/shared/runs", words)
    job = SlurmJob(made.run, made.root, made.cluster, made.command, Path("/home/ada/p"), Path("/home/ada/s"), "python")
    file = HERE / f"{name}.sh"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(job.text())
    assert job.text() == file.read_text()


def test_the_command_survives_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["optimizer.groups=[{match: 'fc.*', lr: 1e-3}]", "vars.text=a $HOME `b`"]
    made = slurm_job(SlurmCluster(), "a1", "/shared/my runs", words)
    line = next(line for line in made.text().splitlines() if line.startswith("srun"))
    assert shlex.split(line)[-len(made.command) - 2 :] == [*made.command, "||", "exit"]
    assert {*words, 'run.root="/shared/my runs"'} <= set(made.command)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 60),
        ("90", 5400),
        ("5:30", 330),
        ("12:00:00", 43200),
        ("2-12", 216000),
        ("1-01:30", 91800),
        ("1-01:30:15", 91815),
        ("0:59", 59),
        ("1h", None),
        ("", None),
        ("1:2:3:4", None),
        ("-5", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_limit", "0:59"),
        ("time_limit", "soon"),
        ("partition", "a b"),
        ("partition", "--uid=root"),
        ("account", "x\n#SBATCH"),
        ("gres", "gpu:'1'"),
        ("constraint", ""),
        ("cpus", 0),
        ("notice_seconds", 0),
        ("sbatch_options", ["-p gpu"]),
        ("sbatch_options", ["--mem=1\n#SBATCH --uid=0"]),
    ],
)
def test_bad_values_are_rejected(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as found:
        KIND.check(SlurmCluster(**{key: value}))
    assert f"cluster.{key}" in str(found.value)


@pytest.mark.parametrize(
    ("more", "root", "key"),
    [
        ({"min_nodes": 3, "nodes": 2}, "/runs", "cluster.min_nodes"),
        ({"min_nodes": 0}, "/runs", "cluster.min_nodes"),
        ({"env": ["LAUNCH_NO_SUCH"]}, "/runs", "LAUNCH_NO_SUCH"),
        ({}, "head:///runs", "head:///runs"),
    ],
)
def test_requests_that_no_slurm_can_meet_are_rejected(more: dict[str, Any], root: str, key: str) -> None:
    with pytest.raises(ConfigError) as found:
        slurm_job(SlurmCluster(**more), "a1", root, [])
    assert key in str(found.value)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_the_kind_plans_and_rejects_bad_keys(place: Place, state: Path) -> None:
    job = (*TOY, "trainer.deterministic=true")
    words = ["cluster=slurm", "cluster.nodes=2", "scaling.workers=2"]
    rejected = [["cluster.partition=nope"]]
    rejects = {"partition=nope": "allocation failure: Invalid partition name specified"}
    (state / "responses").write_text(json.dumps({"rejects": rejects}))
    harness = Harness(words, rejected, place.directory, job, (), (), {"HOME": str(place.home)})
    check_requests(harness)
    assert not (user_state.directory() / "slurm").exists()
    assert all("--test-only" in call for call in calls(state, "sbatch"))


def test_a_run_is_submitted_and_followed(here: Place, state: Path) -> None:
    states = ["PENDING|Resources", "PENDING|Priority", None, "RUNNING|None", "COMPLETED|None"]
    done = train(
        here, state, {"states": states, "output": "a1: 2 CPU workers\nstep 50\n", "exit": 0}, "cluster.nodes=2"
    )
    assert (done.status, done.out) == (0, f"{here.runs}/a1\n"), done.err
    lines = done.err.splitlines()
    for part in ("Resources", "Priority", "running", "step 50"):
        assert len([line for line in lines if part in line]) == 1, done.err
    assert [*calls(state, "sbatch")] == ["sbatch --test-only", "sbatch --parsable"]
    script = (state / "script").read_text()
    assert {"#SBATCH --nodes=2", f"#SBATCH --chdir={here.directory}"} <= set(script.splitlines())
    assert not here.runs.exists(), "the driver makes the directory of the run"


def test_the_exit_status_is_that_of_the_run(here: Place, state: Path) -> None:
    assert train(here, state, {"states": ["RUNNING|None", "FAILED|NonZeroExitCode"], "exit": 143}).status == 143


def test_a_job_without_a_result_is_a_failed_run(here: Place, state: Path) -> None:
    done = train(here, state, {"states": ["RUNNING|None", "TIMEOUT|TimeLimit"]})
    assert done.status == 1
    assert "run.resume=auto" in done.err


def test_a_job_that_waits_is_removed_by_ctrl_c(here: Place, state: Path) -> None:
    done = train(here, state, {"states": ["PENDING|Priority"], "interrupt": 1})
    assert done.status == 130, done.err
    assert calls(state, "scancel") == ["scancel 7"]


def test_a_run_is_stopped_by_ctrl_c(here: Place, state: Path) -> None:
    done = train(here, state, {"states": ["RUNNING|None"], "interrupt": 1, "output": "stopped\n"})
    assert done.status == 130, done.err
    assert "stopped" in done.err.splitlines()
    assert {*calls(state, "scancel")} == {"scancel --signal=USR2 7"}


def test_a_detached_run_waits_and_is_removed(here: Place, state: Path) -> None:
    done = train(here, state, {"states": ["PENDING|Priority"]}, "cluster.detach=true")
    assert (done.status, done.out) == (0, f"{here.runs}/a1\n"), done.err
    assert calls(state, "squeue") == []
    again = here.here(*TOY, *SBATCH)
    assert (again.status, len(calls(state, "sbatch --parsable"))) == (2, 1), again.err
    stopped = here.here("stop", "a1")
    assert (stopped.status, stopped.out) == (0, f"{here.runs}/a1\n"), stopped.err
    assert calls(state, "scancel") == ["scancel 7"]
    assert here.here("stop", "a1").status == 2, "there is no such run any more"


def test_logs_wait_for_the_start(here: Place, state: Path) -> None:
    output = {
        "output": "the data are missing\n",
        "exit": 2,
        "states": ["PENDING|Resources", "PENDING|Priority", "FAILED|"],
    }
    assert train(here, state, output, "cluster.detach=true").status == 0
    log = here.here("logs", "a1")
    assert log.status == 2, "no run was made"
    for part in ("Priority", "the data are missing"):
        assert part in log.err


def test_other_runs_do_not_wait(here: Place, state: Path) -> None:
    assert KIND.waiting(RunDirectory(here.runs / "other")) is None
    assert calls(state, "squeue") == []


def test_a_rejection_is_reported_before_anything_is_created(here: Place, state: Path) -> None:
    rejects = {"partition=nope": "allocation failure: Invalid partition name specified"}
    done = train(here, state, {"rejects": rejects}, "cluster.partition=nope")
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert "cluster.partition=nope" in done.err
    assert calls(state, "sbatch") == ["sbatch --test-only"]
    assert not here.runs.exists()
    assert not (user_state.directory() / "slurm").exists()


@pytest.mark.parametrize(
    ("more", "message", "error", "shown"),
    [
        ({"partition": "nope"}, "error: invalid partition specified: nope", ConfigError, "cluster.partition=nope"),
        (
            {"partition": "gpu", "account": "nope"},
            "error: Invalid account or account/partition combination specified",
            ConfigError,
            "cluster.account=nope",
        ),
        ({"qos": "nope"}, "allocation failure: Invalid qos specification", ConfigError, "cluster.qos=nope"),
        ({"gres": "gpu:9"}, "error: Invalid generic resource (gres) specification", ConfigError, "cluster.gres=gpu:9"),
        ({"constraint": "x"}, "allocation failure: Invalid feature specification", ConfigError, "cluster.constraint=x"),
        ({"nodes": 99}, "Requested node configuration is not available", ConfigError, "cluster.nodes=99"),
        ({}, f"allocation failure: {INVALID}", ClusterError, INVALID),
        ({}, "sbatch: fatal: Could not establish a configuration source", ClusterError, "configuration source"),
        ({}, "sbatch: error: something new", ConfigError, "something new"),
    ],
)
def test_a_rejection_names_the_key(
    state: Path, more: dict[str, Any], message: str, error: type[Exception], shown: str
) -> None:
    (state / "responses").write_text(json.dumps({"rejects": {"all": message}}))
    with pytest.raises(error) as found:
        Scheduler().check("", SlurmCluster(**more), {})
    assert shown in str(found.value)


def test_slurm_is_not_installed(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(HERE))
    done = here.here(*TOY, *SBATCH)
    assert done.status == 2
    assert "sbatch" in done.err
    with pytest.raises(ClusterError):
        Scheduler().state("7")


def test_variables_of_sbatch_do_not_replace_keys(here: Place, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm prefers its variables to the script, but the command line is what the user typed last."""
    from launcher.clusters.slurm.scheduler import _environment

    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "other")
    options = slurm_job(SlurmCluster(partition="gpu", time_limit="60"), "a1", "/runs", []).options()
    assert {name for name in _environment(options) if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


def test_an_existing_run_is_not_replaced(here: Place, state: Path) -> None:
    run = RunDirectory(here.runs / "a1")
    run.create()
    run.write_result({"status": "stopped"})
    refused = here.here(*TOY, *SBATCH)
    assert (refused.status, calls(state, "sbatch")) == (2, []), refused.err


def test_a_sweep_is_one_job(here: Place, state: Path) -> None:
    planned = here.here("plan", *TOY, *SBATCH, "-m", "optimizer.lr=0.1,0.2", "--json")
    assert planned.status == 0, planned.err
    found = json.loads(planned.out)
    assert found["directory"] == f"{here.runs}/a1"
    assert {"-m", "optimizer.lr=0.1,0.2", 'run.name="a1"'} <= set(found["command"])
    assert not (state / "calls").exists(), "a plan calls no program of Slurm"


def test_secrets_are_not_written_to_a_script(here: Place, state: Path) -> None:
    done = here.here("plan", *TOY, *SBATCH, "+model.secret_key=hunter2")
    assert done.status == 2
    assert "hunter2" not in done.err + done.out


# ---- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected", "waits", "over"),
    [
        ("PENDING|Resources\n", QueueState("PENDING", "Resources"), True, False),
        ("CONFIGURING|None\n", QueueState("CONFIGURING"), True, False),
        ("RUNNING|None\n", QueueState("RUNNING"), False, False),
        ("COMPLETING|None\n", QueueState("COMPLETING"), False, False),
        ("TIMEOUT|TimeLimit\n", QueueState("TIMEOUT", "TimeLimit"), False, True),
        ("REQUEUED|(null)\n", QueueState("REQUEUED"), True, False),
    ],
)
def test_states_of_squeue(output: str, expected: QueueState, waits: bool, over: bool) -> None:
    found = state_in(output)
    assert found == expected
    assert (found.is_waiting, found.is_over) == (waits, over)


def test_no_state_is_none() -> None:
    assert state_in("\n") is None


def test_the_exit_status_is_that_of_the_last_start(tmp_path: Path) -> None:
    assert submission.exit_status(tmp_path) is None
    for start, content in (("7.9", {"exit": 143}), ("7.10", {"exit": 0})):
        (tmp_path / start).mkdir()
        (tmp_path / start / "status.json").write_text(json.dumps(content))
    assert submission.exit_status(tmp_path) == 0
    (tmp_path / "7.11").mkdir()
    assert submission.exit_status(tmp_path) is None, "the job was queued again, and its run continues"


@pytest.mark.parametrize(
    "last", ["TIMEOUT|TimeLimit", "CANCELLED|None", "NODE_FAIL|NodeDown", "OUT_OF_MEMORY|None", ""]
)
def test_a_job_that_ended_without_a_result_is_a_training_error(state: Path, last: str) -> None:
    (state / "responses").write_text(json.dumps({"states": ["RUNNING|None", last]}))
    with pytest.raises(TrainingError):
        submission.Follower(state, "7", "a1", lambda line: None).to_the_end([])


def test_files_of_jobs_are_separate() -> None:
    assert folder_of("/a/runs/x") != folder_of("/b/runs/x")
    assert folder_of("/a/runs/x").is_relative_to(user_state.directory())


def test_the_kind_is_registered() -> None:
    assert named("slurm") is KIND
    with pytest.raises(ConfigError):
        KIND.machines(SlurmCluster())
    assert sys.executable == slurm_job(SlurmCluster(), "a1", "/runs", []).python
