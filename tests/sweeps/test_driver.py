"""Complete sweeps in this process (`cluster=none`): files, resume, pruning and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sweep_fixtures import HERE, PROJECT, Sweep, result, table

import launcher
from launcher.errors import ConfigError, RequestError, RunError
from tests.support.waiting import wait_for


def test_numbers_parameters_and_objective_agree_everywhere(sweep: Sweep, words: list[str], tmp_path: Path) -> None:
    """A trial equals a single run with its overrides, in trials.csv, result.json and TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = sweep("run.name=s", "optimizer.lr=0.1,0.4", "model=line", "vars.a=1,x")

    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 4
    assert found["best"]["overrides"] == ["optimizer.lr=0.4", "vars.a=1"]
    rows = table(found["directory"])
    assert list(rows[0]) == ["number", "state", "objective", "seconds", "error", "optimizer.lr", "vars.a"]
    for row in rows:
        own = result(found["directory"], row["number"])
        parameters = {"optimizer.lr": float(row["optimizer.lr"]), "vars.a": row["vars.a"]}
        expected = {"number": int(row["number"]), "parameters": parameters, "objective": float(row["objective"])}
        assert own["trial"] == expected
        assert own["metrics"]["val/loss"] == float(row["objective"])
        events = EventAccumulator(str(Path(found["directory"]) / row["number"])).Reload()
        assert events.Scalars("val/loss")[-1].value == np.float32(row["objective"])
        start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        hparams = HParamsPluginData.FromString(start).session_start_info.hparams
        assert {key: value.string_value or value.number_value for key, value in hparams.items()} == parameters
    alone = launcher.launch(*words, "optimizer.lr=0.4", "run.name=alone", config_dir=PROJECT, quiet=True)
    assert alone["metrics"]["val/loss"] == float(rows[2]["objective"])
    assert alone["metrics"]["train/loss"] == result(found["directory"], 2)["metrics"]["train/loss"]

    further = launcher.launch(
        f"run.root={tmp_path}", "run.like=s/best", "trainer.epochs=6", "run.name=more", config_dir=PROJECT, quiet=True
    )
    assert further["steps"] == 6
    assert further["metrics"]["val/loss"] < found["best"]["objective"]
    assert (Path(found["directory"]) / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("trials", [9, pytest.param(27, marks=pytest.mark.slow)])
def test_asha_finds_the_same_region_in_half_of_the_steps(sweep: Sweep, trials: int) -> None:
    rates = ",".join(f"{0.001 * 1000 ** (i / (trials - 1)):.5g}" for i in range(trials))
    quick = ("logging.tensorboard=false", "checkpoint.every=9ep", "checkpoint.monitor=null", "sweep.metric=val/loss")
    common = (f"optimizer.lr=shuffle({rates})", "trainer.epochs=9", *quick)

    grid = sweep("run.name=grid", *common)
    asha = sweep("run.name=asha", *common, "sweep.pruner=asha")

    assert grid["result"]["steps"] == trials * 9
    assert asha["result"]["steps"] <= grid["result"]["steps"] / 2
    best = [found["best"]["parameters"]["optimizer.lr"] for found in (grid, asha)]
    assert 0.3 < best[0] < 0.8  # the minimum is at 0.5
    assert best[1] == pytest.approx(best[0], rel=0.35)
    pruned = [trial for trial in asha["trials"] if trial["state"] == "pruned"]
    assert len(pruned) >= trials / 3
    assert all(result(asha["directory"], trial["number"])["status"] == "pruned" for trial in pruned)
    assert all(trial["objective"] is not None for trial in pruned)


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "cmaes", "nsga2"])
def test_each_search_runs(sweep: Sweep, sampler: str) -> None:
    found = sweep(
        f"sweep={sampler}",
        "optimizer.lr=tag(log,interval(1e-3,1))",
        "model.start=range(1,4)",
        "logging.tensorboard=false",
        trials=3,
    )
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 3
    assert len({trial["optimizer.lr"] for trial in found["trials"]}) == 3
    assert all(0.001 <= trial["optimizer.lr"] <= 1 and trial["model.start"] in (1, 2, 3) for trial in found["trials"])


def test_trials_over_an_interval_imply_a_search(sweep: Sweep) -> None:
    found = sweep("optimizer.lr=interval(0,1)", "logging.tensorboard=false", trials=2)
    assert len(found["trials"]) == 2
    more = sweep(f"run.name={Path(found['directory']).name}", "run.resume=true", trials=4)
    assert [trial["state"] for trial in more["trials"]] == ["completed"] * 4
    assert len({trial["optimizer.lr"] for trial in more["trials"]}) == 4  # not the first two again


def test_several_objectives(sweep: Sweep) -> None:
    found = sweep(
        "sweep=nsga2",
        "optimizer.lr=interval(0.01,1)",
        "sweep.metric=[val/loss,val/size]",
        "sweep.direction=[min,max]",
        trials=4,
    )
    rows = table(found["directory"])
    assert all(len(row["objective"].split(";")) == 2 for row in rows)
    best = (Path(found["directory"]) / "best.yaml").read_text()
    assert "front: [" in best
    assert "val/size" in best


def test_failed_trials_are_recorded_and_the_sweep_continues(sweep: Sweep, tmp_path: Path) -> None:
    found = sweep("run.name=s", "data.trouble='',raise", "optimizer.lr=0.1,1e30", "sweep.keep=best")

    assert [trial["state"] for trial in found["trials"]] == ["completed", "failed", "failed", "failed"]
    errors = [trial["error"] or "" for trial in found["trials"]]
    assert "NaN or infinite" in errors[1]
    assert "points.csv, row 7" in errors[2]
    assert [row["error"] for row in table(found["directory"])] == errors
    for number, error in enumerate(errors):
        own = result(found["directory"], number)
        assert (own["error"] or "") == error
        assert own["status"] == found["trials"][number]["state"]
        assert (tmp_path / "s" / str(number) / "checkpoints").exists() is (number == 0)
    assert found["result"]["status"] == "completed"


def test_fail_fast_stops_at_the_first(sweep: Sweep) -> None:
    found = sweep("data.trouble='',raise", "optimizer.lr=0.1,0.2", "sweep.fail_fast=true")
    assert found["result"]["status"] == "failed"
    assert [trial["state"] for trial in found["trials"]] == ["completed", "completed", "failed", "waiting"]
    assert "row 7" in found["result"]["error"]


def test_only_the_best_keeps_its_checkpoints(sweep: Sweep) -> None:
    found = sweep("optimizer.lr=0.1,0.5,0.2", "sweep.keep=best")
    kept = [(Path(found["directory"]) / str(number) / "checkpoints").exists() for number in range(3)]
    assert kept == [False, True, False]
    assert result(found["directory"], 0)["checkpoint"] is None
    assert result(found["directory"], 1)["checkpoint"] is not None


def test_another_run_starts_with_the_weights_of_the_best(sweep: Sweep, words: list[str]) -> None:
    import launcher

    found = sweep("optimizer.lr=0.1,0.5", "run.name=s")
    begins = launcher.launch(
        *words, "checkpoint.load=s/best", "optimizer.lr=0", "trainer.epochs=1", config_dir=PROJECT, quiet=True
    )
    assert begins["metrics"]["val/loss"] == found["best"]["objective"]


def validations(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["val/loss"] for entry in entries if "val/loss" in entry]


def test_a_resumed_sweep_keeps_the_configuration_of_run_like(sweep: Sweep, words: list[str], tmp_path: Path) -> None:
    """Would be wrong: trials after a resume that train the default job; weights searched for within the sweep."""
    import launcher

    launcher.launch(*words, "run.name=base", "trainer.epochs=2", config_dir=PROJECT, quiet=True)
    root = f"run.root={tmp_path}"
    more = ("run.name=s", "run.like=base", "checkpoint.load=base", "sweep=random", "optimizer.lr=interval(0.1,0.2)")
    launcher.sweep(root, *more, trials=1, config_dir=PROJECT, quiet=True)
    found = launcher.sweep(root, "run.name=s", "run.resume=true", "cluster=none", trials=2, quiet=True)
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 2
    for trial in range(2):
        assert result(tmp_path / "s", trial)["epochs"] == 2.0
        assert validations(tmp_path / "s" / str(trial))[0] < validations(tmp_path / "base")[-1]


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["optimizer.lr=interval(0,1)"], ConfigError, "infinitely many values"),
        (["optimizer.lr=0.1,high"], ConfigError, "optimizer.lr is 'high'"),
        (["model=line,lime"], ConfigError, 'no model called "lime"'),
        (["model.nope=1,2"], ConfigError, "nope"),
        (["sweep=tpe", "optimizer.lr=interval(0,1)"], ConfigError, "sweep.trials=20"),
        (["sweep=tpe", "sweep.trials=3"], ConfigError, "no key to search over"),
        (["optimizer.lr=1,2", "sweep.trials=3", "sweep=grid"], ConfigError, "one trial per combination"),
        (["optimizer.lr=1,2", "sweep.metric=val/los"], ConfigError, 'Did you mean "val/loss"'),
        (["optimizer.lr=1,2", "sweep.metric=[val/loss,val/size]", "sweep.pruner=asha"], ConfigError, "one objective"),
        (
            ["optimizer.lr=1,2", "sweep.metric=[val/loss,val/size]", "sweep.direction=[min]"],
            ConfigError,
            "one for each",
        ),
        (["sweep.pruner=hyper"], ConfigError, "hyperband"),
        (["scaling.workers=1,2"], ConfigError, "scaling.workers=2"),
        (["cluster=local", "scaling.workers=1,99"], RequestError, "99 workers"),
        (["run.name=absent", "run.resume=true"], RunError, 'no run "absent"'),
    ],
)
def test_invalid_requests_are_rejected_before_anything_starts(
    sweep: Sweep, tmp_path: Path, more: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sweep(*more)
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_sweep_does_nothing_and_other_words_are_rejected(sweep: Sweep) -> None:
    first = sweep("run.name=s", "optimizer.lr=0.1,0.2")
    before = {path: path.stat().st_mtime_ns for path in Path(first["directory"]).rglob("metrics.jsonl")}

    again = sweep("run.name=s", "run.resume=true", "optimizer.lr=0.1,0.2")

    assert again["trials"] == first["trials"]
    assert {path: path.stat().st_mtime_ns for path in Path(first["directory"]).rglob("metrics.jsonl")} == before
    with pytest.raises(RunError, match="no longer be comparable"):
        sweep("run.name=s", "run.resume=true", "optimizer.lr=0.1,0.3")
    with pytest.raises(RunError, match="already exists"):
        sweep("run.name=s", "optimizer.lr=0.1,0.2")


def command(tmp_path: Path, *more: str) -> list[str]:
    fixed = ["experiment=line", "cluster=none", f"run.root={tmp_path}", "run.name=s"]
    return [sys.executable, "-m", "launcher", "-m", "--config-dir", str(PROJECT), *fixed, *more]


def test_a_killed_driver_loses_no_finished_trial(sweep: Sweep, tmp_path: Path) -> None:
    """6 trials, SIGKILL in the middle, resume: 6 completed, none trained twice, equal objectives."""
    swept = ("optimizer.lr=range(0.1,0.7,0.1)", "model.nap=0.005", "checkpoint.every=1", "logging.tensorboard=false")
    driver = subprocess.Popen(command(tmp_path, *swept), cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "s" / "study.journal"
    wait_for(
        lambda: (
            (tmp_path / "s" / "2" / ".step").exists() and int((tmp_path / "s" / "2" / ".step").read_text() or 0) >= 1
        )
    )
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "half')  # a truncated line
    os.symlink(journal, f"{journal}.lock")
    done = {n: result(tmp_path / "s", n) for n in range(2)}
    assert all(own["status"] == "completed" for own in done.values())
    ended = {path: path.stat().st_mtime_ns for n in range(2) for path in [tmp_path / "s" / str(n) / "metrics.jsonl"]}

    found = sweep("run.name=s", "run.resume=true")

    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 6
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    whole = sweep("run.name=whole", swept[0], "logging.tensorboard=false")
    for one, other in zip(found["trials"], whole["trials"], strict=True):
        assert (one["objective"], one["optimizer.lr"]) == (other["objective"], other["optimizer.lr"])


def test_ctrl_c_saves_and_the_sweep_resumes_from_the_checkpoint(sweep: Sweep, tmp_path: Path) -> None:
    more = ("optimizer.lr=0.1,0.2,0.3", "model.nap=0.01", "trainer.epochs=5")
    driver = subprocess.Popen(
        command(tmp_path, *more), cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_for(
        lambda: (
            (tmp_path / "s" / "1" / ".step").exists() and int((tmp_path / "s" / "1" / ".step").read_text() or 0) >= 2
        )
    )
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 130, err
    assert out.strip() == str(tmp_path / "s")
    assert "run.resume=true" in err
    assert result(tmp_path / "s")["status"] == "stopped"
    assert [row["state"] for row in table(tmp_path / "s")] == ["completed", "stopped", "waiting"]

    found = sweep("run.name=s", "run.resume=true")

    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 3
    assert result(tmp_path / "s", 1)["restarts"] == 1
    assert result(tmp_path / "s", 1)["lost_steps"] == 0


def test_the_plan_shows_the_grid_and_creates_nothing(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from launcher import cli

    asked = ["plan", "-m", "--json", "--config-dir", str(PROJECT), *words, "optimizer.lr=0.1,0.2", "vars.a=x,y"]
    assert cli.run(asked) == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["trials"], plan["concurrency"], plan["objectives"]) == (4, 1, {"val/loss": "min"})
    assert plan["grid"][1] == ["optimizer.lr=0.1", "vars.a=y"]
    assert plan["plan"]["batches"]["steps"] == 3
    assert list(tmp_path.iterdir()) == []


def test_sweeper_parameters_of_a_file(words: list[str], tmp_path: Path) -> None:
    """`hydra.sweeper.params` in a file names the axes; the command line wins over it."""
    import shutil

    from launcher.jobs.prepare import Request
    from launcher.sweeps import api as sweeps
    from launcher.sweeps.observer import SweepObserver

    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    with (project / "experiment" / "line.yaml").open("a") as file:
        file.write("\nhydra:\n  sweeper:\n    params:\n      optimizer.lr: 0.1,0.2\n      trainer.epochs: range(1,4)\n")
    spec, _ = sweeps.plan(Request([*words, "trainer.epochs=2,3"], project), SweepObserver())
    assert spec.total == 4
    assert [axis.key for axis in spec.space.axes] == ["optimizer.lr", "trainer.epochs"]


def test_a_stop_request_and_the_listing(sweep: Sweep, tmp_path: Path) -> None:
    from launcher.cli.listing import rows

    more = ("optimizer.lr=0.1,0.2,0.3", "model.nap=0.01", "trainer.epochs=5")
    with subprocess.Popen(
        command(tmp_path, *more), cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as driver:
        wait_for(lambda: (tmp_path / "s" / "0" / "metrics.jsonl").exists())
        assert [row["status"] for row in rows(tmp_path)] == ["running"]
        (tmp_path / "s" / ".stop").touch()
        assert driver.wait(timeout=240) == 0
    own = result(tmp_path / "s")
    assert (own["status"], own["reason"]) == ("stopped", "request")
