"""Runs and their directories: names, resume, `run.like`, failures, and disks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs import training
from launcher.runs import RunDirectory
from tests.support.command import TOY, Place

RESULT_KEYS = {
    *("status", "reason", "error", "steps", "epochs", "samples", "workers", "world_sizes", "restarts", "lost_steps"),
    "preemptions",
    *("seconds", "seconds_to_first_step", "phases", "samples_per_second", "cost_usd", "checkpoint", "metrics", "best"),
    *("user", "versions", "git"),
}


def checkpoints(place: Place, run: str) -> list[str]:
    return sorted(path.name for path in (place.runs / run / "checkpoints").glob("step-*"))


# ---- a run and its record -------------------------------------------------------------------------------------------


def test_a_run_and_its_record(here: Place) -> None:
    done = here.here(*TOY, "run.name=a", "+model.secret_key=hunter2", "+vars.where=${oc.env:HOME}")
    assert (done.status, done.out) == (0, f"{here.runs / 'a'}\n")
    assert "completed after 8 steps" in done.err.splitlines()[-1]
    result = here.result("a")
    assert set(result) == RESULT_KEYS
    assert (result["status"], result["steps"], result["samples"], result["error"]) == ("completed", 8, 80, None)
    assert result["checkpoint"] == str(here.runs / "a/checkpoints/step-00000008")
    assert result["best"]["tag"] == "val/loss"
    assert result["workers"] == 1
    assert result["world_sizes"] == [1]
    files = {path.name.partition(".out")[0] for path in (here.runs / "a").iterdir() if not path.name.startswith(".")}
    expected = {"config.yaml", "overrides.yaml", "code.patch", "result.json", "metrics.jsonl", "checkpoints", "log.txt"}
    assert files - expected == {name for name in files if name.startswith("events.out") or name == "events"}
    assert expected <= files
    config = (here.runs / "a/config.yaml").read_text()
    assert "hunter2" not in config
    assert "secret_key: '***'" in config
    assert "${oc.env:HOME}" in config
    words = (here.runs / "a/overrides.yaml").read_text()
    assert "hunter2" not in words
    assert '- "experiment=toy"' in words
    assert all(
        "hunter2" not in path.read_text(errors="replace") for path in (here.runs / "a").iterdir() if path.is_file()
    )


def test_code_patch_contains_uncommitted_changes(here: Place) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *words], cwd=here.directory, check=True, capture_output=True)

    notes = here.directory / "notes.txt"
    try:
        git("init", "-q", "-b", "trunk")
        notes.write_text("as committed\n")
        git("add", "notes.txt")
        git("commit", "-qm", "x")
        notes.write_text("as committed\na change of mine\nconnect('AccountKey=hunter2==')\n")
        assert here.here(*TOY, "run.name=a", "trainer.steps=1").status == 0
    finally:
        shutil.rmtree(here.directory / ".git")
        notes.unlink()
    assert (here.runs / "a/code.patch").read_text().endswith(" as committed\n+a change of mine\n+connect('***')\n")
    found = here.result("a")["git"]
    assert found["branch"] == "trunk"
    assert found["dirty"] is True
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])


def test_default_names_are_unique(here: Place) -> None:
    """Two runs may start in the same second, for example by a scheduler."""
    outs = {here.here(*TOY, "trainer.steps=1", "logging.tensorboard=false").last for _ in range(3)}
    assert len(outs) == 3
    assert all(re.match(r"toy-\d{8}-\d{6}", Path(out).name) for out in outs)


def test_what_loader_processes_print(here: Place) -> None:
    """They are forked from a process that may hold a lock, and no thread reads their events."""
    done = here.here(*TOY, "run.name=a", "data.num_workers=1", "data.speak=true")
    assert done.status == 0, done.err
    assert "row 3 is read" in done.err
    assert "[rank 0] row 3 is read" in (here.runs / "a/log.txt").read_text()


def test_a_name_in_use(here: Place) -> None:
    assert here.here(*TOY, "run.name=a", "trainer.steps=1").status == 0
    before = (here.runs / "a/result.json").read_text()
    refused = here.here(*TOY, "run.name=a")
    assert refused.status == 2
    assert "run.resume=true" in refused.err
    assert (here.runs / "a/result.json").read_text() == before


def test_a_root_with_spaces_and_a_tilde(here: Place) -> None:
    done = here.here(*TOY, "run.root='~/my runs'", "run.name='a run'", "trainer.steps=1")
    assert (done.status, done.out) == (0, f"{here.home}/my runs/a run\n")
    assert here.here("runs", "run.root='~/my runs'", "--json").out.count('"a run"') == 1
    assert here.here("evaluate", "a run", "run.root='~/my runs'").status == 0
    assert not here.runs.exists()
    shutil.rmtree(here.home / "my runs")


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(here: Place) -> Place:
    """A run `a` that was stopped at step 4 of 8."""
    assert here.here(*TOY, "run.name=a", "trainer.steps=4").status == 0
    config = here.runs / "a/config.yaml"
    config.write_text(config.read_text().replace("steps: 4", "steps: null"))
    (here.runs / "a/overrides.yaml").write_text('- "experiment=toy"\n- "run.name=a"\n')
    result = here.result("a") | {"status": "stopped", "reason": "signal"}
    (here.runs / "a/result.json").write_text(json.dumps(result))
    return here


def test_a_run_that_another_process_resumes_at_the_same_time(stopped: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against: two commands that check at the same time and then write the same directory."""
    run, plan = RunDirectory(stopped.runs / "a"), training.make_plan

    def while_another_begins(*arguments: Any) -> Any:
        run.claim()
        return plan(*arguments)

    monkeypatch.setattr(training, "make_plan", while_another_begins)
    words = run.overrides.read_text()
    refused = stopped.here("--config-dir", "own", "run.name=a", "run.resume=true", "optimizer.lr=0.5")
    assert (refused.status, refused.out) == (2, "")
    assert 'The run "a" is running' in refused.err.splitlines()[-1]
    assert (run.status(), run.overrides.read_text()) == ("running", words)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words",
    [
        ("--config-dir", "own", "run.name=a", "run.resume=true"),
        (*TOY, "run.name=a", "run.resume=auto"),  # the command that started it, repeated by a scheduler
        ("run.name=a", "run.resume=true", "optimizer.lr=0.5"),
    ],
)
def test_resume(stopped: Place, words: tuple[str, ...]) -> None:
    done = stopped.here(*words)
    assert (done.status, done.out) == (0, f"{stopped.runs / 'a'}\n"), done.err
    assert "Continuing from step 4" in done.err
    result = stopped.result("a")
    assert (result["status"], result["steps"], result["reason"]) == ("completed", 8, None)
    changed = "optimizer.lr=0.5" in words
    assert ("Over the run's own configuration: optimizer.lr=0.5" in done.err) is changed
    assert ("lr: 0.5" in (stopped.runs / "a/config.yaml").read_text()) is changed
    assert (stopped.runs / "a/overrides.yaml").read_text().startswith('- "experiment=toy"\n')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.width=2", r"another model"),
        ("data.samples=50", r"another data"),
        ("model=mlp", r"another model"),
        ("optimizer=sgd", r"another optimizer"),
        ("trainer.seed=1", r"trainer.seed"),
        ("trainer.global_batch_size=20", r"trainer.global_batch_size"),
        ("experiment=mnist", r"experiment"),
        ("foo=1", r'no key "foo"'),
    ],
)
def test_a_resume_that_would_break_the_saved_state(stopped: Place, words: str, message: str) -> None:
    before = {path: path.read_bytes() for path in (stopped.runs / "a").rglob("*") if path.is_file()}
    refused = stopped.here("--config-dir", "own", "run.name=a", "run.resume=true", words)
    assert refused.status == 2, refused.err
    assert re.search(message, refused.err), refused.err
    assert {path: path.read_bytes() for path in (stopped.runs / "a").rglob("*") if path.is_file()} == before


def test_resume_of_a_completed_run_does_nothing(here: Place) -> None:
    assert here.here(*TOY, "run.name=a").status == 0
    before = (here.runs / "a/result.json").read_text()
    done = here.here(*TOY, "run.name=a", "run.resume=true")
    assert (done.status, done.out) == (0, f"{here.runs / 'a'}\n")
    assert "nothing to do" in done.err
    assert (here.runs / "a/result.json").read_text() == before
    longer = here.here("run.name=a", "run.resume=true", "trainer.epochs=3")
    assert longer.status == 0
    assert here.result("a")["steps"] == 12


def test_a_run_that_ended_early_reports_why_and_continues_with_another_override(here: Place) -> None:
    early = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=0", "trainer.epochs=6")
    assert here.here(*TOY, *early, "run.name=a").status == 0
    assert (here.result("a")["steps"], here.result("a")["reason"]) == (8, "early_stopping")
    again = here.here(*TOY, "run.name=a", "run.resume=true")
    assert again.status == 0
    assert "stopped at 8 of 24 steps" in again.err
    assert "early_stopping" in again.err
    assert "callbacks.early_stopping.patience" in again.err
    assert here.result("a")["steps"] == 8
    more = here.here("--config-dir", "own", "run.name=a", "run.resume=true", "callbacks.early_stopping.patience=10")
    assert more.status == 0, more.err
    assert (here.result("a")["steps"], here.result("a")["reason"]) == (24, None)


def test_resume_of_a_run_that_does_not_exist(here: Place) -> None:
    refused = here.here(*TOY, "run.name=a", "run.resume=true")
    assert refused.status == 2
    assert 'no run "a"' in refused.err
    assert not here.runs.exists()
    assert here.here(*TOY, "run.name=a", "run.resume=auto", "trainer.steps=1").status == 0
    refused = here.here(*TOY, "run.name=b", "run.resume=true")
    assert 'Did you mean "a"' in refused.err or "holds 1 run" in refused.err


def test_like(here: Place) -> None:
    assert here.here(*TOY, "run.name=a", "trainer.steps=2", "model.width=2").status == 0
    done = here.here("run.like=a", "run.name=b", "trainer.steps=3")
    assert done.status == 0, done.err
    assert here.result("b")["steps"] == 3
    assert "width: 2" in (here.runs / "b/config.yaml").read_text()
    (here.runs / "a" / "remote.json").write_text("{}")  # its recorded root is a directory on the cluster
    config = here.runs / "a" / "config.yaml"
    config.write_text(re.sub(r"(?m)^  root: .*$", "  root: head:///on/the/head", config.read_text(), count=1))
    named = here.here("run.like=a")
    assert named.status == 0, named.err
    assert (Path(named.last).parent, Path(named.last).name[:2]) == (here.runs, "a-")


def test_weights_of_another_run(here: Place) -> None:
    assert here.here(*TOY, "run.name=a").status == 0
    assert here.here(*TOY, "run.name=b", "checkpoint.load=a", "trainer.steps=2").status == 0
    assert here.result("b")["steps"] == 2
    refused = here.here(*TOY, "run.name=c", "checkpoint.load=a", "model.width=2")
    assert refused.status == 2
    assert "net.weight" in refused.err


# ---- configurations of other people ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planted",
    [
        "model:\n  _target_: os.mkdir\n  path: planted\n",
        "model:\n  _target_: toy.Line\n  secret_key:\n    _target_: subprocess.Popen\n    args: [touch, planted]\n",
        "model:\n  _target_: antigravity.Line\n",
        "trust: [os]\nmodel:\n  _target_: os.mkdir\n  path: planted\n",
        "hydra:\n  launcher:\n    _target_: os.mkdir\n",
    ],
    ids=["called", "nested", "imported", "trusting itself", "hydra"],
)
@pytest.mark.parametrize("words", ["run.like=a", "run.name=a run.resume=true", "evaluate a"])
def test_a_run_of_another_person_executes_nothing(here: Place, planted: str, words: str) -> None:
    run = here.runs / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(planted)
    (run / "result.json").write_text('{"status": "stopped"}')
    refused = here.here(*words.split(), "cluster=none")
    assert refused.status == 2, refused.err
    assert refused.err.startswith("launch: ")
    assert not (here.directory / "planted").exists()
    assert "antigravity" not in sys.modules


# ---- failing --------------------------------------------------------------------------------------------------------


def test_an_error_of_user_code(here: Place) -> None:
    failed = here.here(*TOY, "run.name=a", "model.failure=raise", "model.at=6")
    assert failed.status == 1
    assert failed.out == f"{here.runs / 'a'}\n"
    assert failed.err.count("Traceback") == 1
    assert failed.err.count("the user's own mistake\"\n") == 1
    trace = failed.err[failed.err.index("Traceback") :]
    assert "in stumble" in trace
    assert "launcher" not in trace.partition("KeyError")[0]
    result = here.result("a")
    assert set(result) == RESULT_KEYS
    assert result["status"] == "failed"
    assert "the user's own mistake" in result["error"]
    assert result["checkpoint"].endswith("step-00000004")
    assert checkpoints(here, "a") == ["step-00000004"]
    assert "run.resume=true" in failed.err.splitlines()[-1]


def test_an_error_that_the_start_check_finds(here: Place) -> None:
    failed = here.here(*TOY, "run.name=a", "model.failure=raise", "model.at=0")
    assert failed.status == 1
    assert "Traceback" in failed.err
    assert "in stumble" in failed.err
    assert not here.runs.exists(), "nothing had begun"


def test_a_loss_that_is_not_a_number(here: Place) -> None:
    failed = here.here(*TOY, "run.name=a", "model.failure=infinite", "model.at=6")
    assert failed.status == 1
    assert "Traceback" not in failed.err
    assert "launch: The loss became NaN or infinite at step 6 on rank 0" in failed.err
    assert f"the last good checkpoint is {here.runs}/a/checkpoints/step-00000004" in failed.err
    result = here.result("a")
    assert result["status"] == "failed"
    assert result["error"].startswith("NonFiniteLoss: ")
    assert checkpoints(here, "a") == ["step-00000004"]


def test_bad_data_that_the_start_check_does_not_find(here: Place) -> None:
    """The run had started, so the exit status is 1. The message is the data set's own."""
    failed = here.here(*TOY, "run.name=a", "data.bad=35")
    assert failed.status == 1
    assert "launch: numbers.csv, row 35: not a number" in failed.err
    assert "Traceback" not in failed.err
    assert here.result("a")["error"] == "DataError: numbers.csv, row 35: not a number"


def pictures(root: Path, count: int) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (8, 8), 20 * index).save(root / label / f"{index:02}.png")


@pytest.mark.parametrize(("position", "status"), [(0, 2), (30, 1)], ids=["in the first batch", "later"])
def test_a_corrupt_picture(here: Place, tmp_path: Path, position: int, status: int) -> None:
    """The start check finds it among the pictures that it reads; otherwise training finds it."""
    from launcher.engine.order import Order
    from models.vision_folder import CHECKED_AT_START, PictureFolder

    root = tmp_path / "pictures"
    pictures(root, 30)
    data = PictureFolder(str(root), size=8, channels=1, num_workers=0)
    files = data.train.files + data.val.files
    looked_at = set(files[:: max(1, len(files) // CHECKED_AT_START)])
    order = [data.train.files[i] for i in Order(len(data.train), 5, seed=0).epoch(0)]
    broken = Path(next(file for file in order[position:] if (file in looked_at) is (status == 2))[0])
    broken.write_bytes(b"this is no picture")
    words = f"data=folder data.root={root} data.size=8 data.channels=1 data.num_workers=0 data.limit=null"
    words += " data.val_limit=null model=mlp model.size=8 model.classes=2 trainer.global_batch_size=5"
    failed = here.here("experiment=mnist_tiny", "cluster=none", "logging.graph=false", "run.name=a", *words.split())
    assert failed.status == status, failed.err
    assert str(broken) in failed.err
    assert "Traceback" not in failed.err
    assert (here.runs / "a").exists() is (status == 1)


# ---- disks ----------------------------------------------------------------------------------------------------------


def test_a_root_that_cannot_be_written(here: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = here.here(*TOY, f"run.root={tmp_path}/file", "run.name=a")
    assert refused.status == 2
    assert "cannot be written" in refused.err
    assert "run.root=DIRECTORY" in refused.err
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").write_text("in the way")
    refused = here.here(*TOY, f"run.root={tmp_path}/root", "run.name=a")
    assert refused.status == 2
    assert "cannot be written" in refused.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system; it needs root."""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(target)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


def test_a_read_only_disk(here: Place, small_disk: Path) -> None:
    """A run of another user can be used, but no new run can be written."""
    assert here.here(*TOY, f"run.root={small_disk}/runs", "run.name=theirs", "logging.tensorboard=false").status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = here.here(*TOY, f"run.root={small_disk}/runs", "run.name=a")
    assert refused.status == 2
    assert "Read-only file system" in refused.err
    assert here.here("evaluate", "theirs", f"run.root={small_disk}/runs").status == 0


def test_a_disk_without_space_for_a_checkpoint(here: Place, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 150_000)
    refused = here.here(*TOY, f"run.root={small_disk}/runs", "run.name=a", "model.width=20000")
    assert refused.status == 2
    assert re.search(r"A checkpoint of this model needs .* KiB, but .* has only .* KiB free", refused.err)
    assert os.listdir(small_disk) == ["ballast"]


def test_a_disk_that_is_full_before_the_start(here: Place, small_disk: Path) -> None:
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    refused = here.here(*TOY, f"run.root={small_disk}/runs", "run.name=a")
    assert refused.status == 2
    assert "run.root=DIRECTORY" in refused.err
    assert os.listdir(small_disk) == ["ballast"]


def test_a_disk_that_fills_up(here: Place, small_disk: Path) -> None:
    """The last good checkpoint is kept, and result.json has the status `failed`."""
    failed = here.here(*TOY, f"run.root={small_disk}/runs", "run.name=a", "trainer.steps=400", "checkpoint.keep=100")
    run = small_disk / "runs/a"
    assert (failed.status, failed.out) == (1, f"{run}\n"), failed.err
    ours = [line for line in failed.err.splitlines() if line.startswith("launch: ")]
    assert len(ours) == 1, failed.err
    assert "No space left" in ours[0]
    assert "Traceback" not in failed.err
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "failed"
    assert "No space left" in result["error"]
    assert Path(result["checkpoint"]).is_dir()
    (run / "metrics.jsonl").unlink()
    again = here.here("evaluate", "a", f"run.root={small_disk}/runs")
    assert again.status == 0, again.err


def test_a_resume_without_a_checkpoint_loads_the_initial_weights(place: Place) -> None:
    """A run that was killed before its first checkpoint must not continue from random weights."""
    assert place.launch(*TOY, "run.name=base").status == 0
    words = (*TOY, "checkpoint.load=base", "checkpoint.every=1000", "trainer.log_every=1")
    kill = "+callbacks.accidents={_target_: toy.Accidents, happen: [{rank: 0, step: 2, name: KILL}]}"
    assert place.launch(*words, "run.name=killed", kill).status != 0
    assert not list((place.runs / "killed/checkpoints").glob("step-*"))
    resumed = place.launch(*words, "run.name=killed", kill, "run.resume=true")
    assert resumed.status == 0, resumed.err
    assert place.launch(*words, "run.name=whole").status == 0
    killed, whole = (
        [json.loads(line).get("train/loss") for line in (place.runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    )
    assert killed == whole
