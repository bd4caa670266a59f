"""`launch diff`, `launch rm`, and the filters, the order and the columns of `launch runs`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.runs import RunDirectory
from tests.support.command import Place


def write_run(root: Path, name: str, age: float = 0.0, **more: Any) -> RunDirectory:
    """Write the files of a run that was started `age` seconds ago. `more`: parts that replace the defaults."""
    run = RunDirectory(root / name)
    run.path.mkdir(parents=True)
    config = {
        "run": {"name": name},
        "model": {"_target_": "models.vision.MLP", **more.get("model", {})},
        "optimizer": {"lr": more.get("lr", 0.1)},
        "checkpoint": {"monitor": "val/loss", "mode": more.get("mode", "min")},
    }
    run.config.write_text(yaml.safe_dump(config))
    run.overrides.write_text(yaml.safe_dump(more.get("words", [f"optimizer.lr={more.get('lr', 0.1)}"])))
    if "patch" in more:
        (run.path / "code.patch").write_text(more["patch"])
    best = more.get("best", 0.5)
    run.write_result(
        {
            "status": more.get("status", "completed"),
            "steps": more.get("steps", 10),
            "versions": more.get("versions", {"torch": "2.13.0"}),
            "git": {"commit": more.get("commit", "abc"), "branch": "main", "dirty": "patch" in more},
            "metrics": {"train/loss": 0.25, "val/loss": best, **more.get("metrics", {})},
            "best": None if best is None else {"tag": "val/loss", "value": best, "step": 10},
        }
    )
    os.utime(run.config, (time.time() - age,) * 2)
    return run


# ---- diff -----------------------------------------------------------------------------------------------------------


def test_diff_lists_what_differs_and_nothing_else(here: Place) -> None:
    """Guards against a comparison that misses a part of a run, or lists equal values."""
    write_run(here.runs, "a", patch="-one\n+two\n", model={"width": 8})
    write_run(
        here.runs,
        "b",
        lr=0.2,
        best=0.4,
        commit="def",
        patch="-one\n+three\n",
        versions={"torch": "2.14.0", "ray": "2.60"},
    )
    done = here.here("diff", "a", "b", "--json")
    assert done.status == 0, done.err
    patch = ["--- a", "+++ b", "@@ -1,2 +1,2 @@", " -one", "-+two", "++three"]
    assert json.loads(done.out) == {
        "runs": ["a", "b"],
        "configuration": {"model.width": {"a": 8}, "optimizer.lr": {"a": 0.1, "b": 0.2}},
        "words": {"a": ["optimizer.lr=0.1"], "b": ["optimizer.lr=0.2"]},
        "code": {"commit": {"a": "abc", "b": "def"}, "patch": patch},
        "versions": {"ray": {"b": "2.60"}, "torch": {"a": "2.13.0", "b": "2.14.0"}},
        "results": {"best val/loss": {"a": 0.5, "b": 0.4}, "val/loss": {"a": 0.5, "b": 0.4}},
    }
    text = here.here("diff", "a", "b").out
    assert "  model.width   8 -> (not set)\n" in text
    assert "  - optimizer.lr=0.1\n  + optimizer.lr=0.2\n" in text
    assert "  ++three\n" in text


def test_diff_of_equal_runs_finds_no_differences(here: Place) -> None:
    for name in ("a", "b"):
        write_run(here.runs, name, metrics={"val/f1": None})
    done = here.here("diff", "a", "b")
    assert (done.status, done.out.splitlines()[-1]) == (0, "No differences.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "two"),
        (["a", "b", "c"], '"c"'),
        (["a", "nowhere"], "nowhere"),
        (["a", "b", "model=mlp"], "run.root"),
    ],
)
def test_diff_needs_two_runs(words: list[str], message: str, here: Place) -> None:
    write_run(here.runs, "a")
    write_run(here.runs, "b")
    done = here.here("diff", *words)
    assert done.status == 2
    assert message in done.err


def test_diff_reports_a_damaged_configuration(here: Place) -> None:
    write_run(here.runs, "a")
    write_run(here.runs, "b").config.write_text("a: [")
    done = here.here("diff", "a", "b")
    assert done.status == 2
    assert "config.yaml" in done.err


# ---- filters, order and columns of `launch runs` --------------------------------------------------------------------


def listed(here: Place, *words: str) -> list[str]:
    done = here.here("runs", *words, "--json")
    assert done.status == 0, done.err
    return [row["name"] for row in json.loads(done.out)]


def write_runs(root: Path) -> None:
    write_run(root, "old", age=9 * 86400, best=0.3, status="failed", metrics={"val/accuracy": 0.5})
    write_run(root, "middle", age=5 * 3600, best=0.1, lr=0.4, steps=5)
    write_run(root, "new", best=None, lr=0.2, status="stopped")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ["old", "middle", "new"]),
        (("state=failed",), ["old"]),
        (("state=failed,stopped",), ["old", "new"]),
        (("state=pruned",), []),
        (("last=7d",), ["middle", "new"]),
        (("last=2h",), ["new"]),
        (("sort=best",), ["middle", "old", "new"]),
        (("sort=-best",), ["old", "middle", "new"]),
        (("sort=optimizer.lr",), ["old", "new", "middle"]),
        (("sort=-steps", "last=7d"), ["new", "middle"]),
        (("sort=val/accuracy",), ["old", "middle", "new"]),
        (("sort=-started",), ["new", "middle", "old"]),
        (("sort=name",), ["middle", "new", "old"]),
    ],
)
def test_runs_are_filtered_and_sorted(words: tuple[str, ...], names: list[str], here: Place) -> None:
    write_runs(here.runs)
    assert listed(here, *words) == names


def test_the_best_run_comes_first_where_larger_values_are_better(here: Place) -> None:
    for name, best in (("a", 0.2), ("b", 0.9)):
        write_run(here.runs, name, best=best, mode="max")
    assert listed(here, "sort=best") == ["b", "a"]


def test_columns_show_keys_and_tags(here: Place) -> None:
    write_runs(here.runs)
    done = here.here("runs", "columns=optimizer.lr,val/accuracy", "state=failed,completed", "--json")
    assert [row["columns"] for row in json.loads(done.out)] == [
        {"optimizer.lr": 0.1, "val/accuracy": 0.5},
        {"optimizer.lr": 0.4, "val/accuracy": None},
    ]
    heading, first, *_ = here.here("runs", "columns=optimizer.lr").out.splitlines()
    assert heading.split()[-1] == "optimizer.lr"
    assert first.split()[-1] == "0.1"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("state=faild", '"failed"'),
        ("last=7", "last=7d"),
        ("sort=val/los", '"val/loss"'),
        ("columns=optimizer.lrr", '"optimizer.lr"'),
        ("columns=", "columns="),
        ("stat=failed", "run.root"),
    ],
)
def test_a_wrong_filter_is_exit_2(word: str, message: str, here: Place) -> None:
    write_runs(here.runs)
    done = here.here("runs", word)
    assert done.status == 2
    assert message in done.err


# ---- rm -------------------------------------------------------------------------------------------------------------


def test_rm_removes_a_run_with_all_its_files(here: Place) -> None:
    run = write_run(here.runs, "a")
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    (run.checkpoints / "step-00000010/data.bin").write_bytes(bytes(1000))
    write_run(here.runs, "b")
    done = here.here("rm", "a")
    assert (done.status, done.out) == (0, "")
    assert os.listdir(here.runs) == ["b"]


def test_rm_does_not_touch_an_active_run_or_sweep(here: Place) -> None:
    """Guards against the loss of a run that a process works on."""
    write_run(here.runs, "a", status="running").beat()
    write_run(here.runs, "sweep")
    write_run(here.runs / "sweep", "0")
    write_run(here.runs / "sweep", "1", status="running").beat()
    before = sorted(path for path in here.runs.rglob("*"))
    for name in ("a", "sweep"):
        done = here.here("rm", name)
        assert done.status != 0
        assert f"launch stop {name}" in done.err
    assert sorted(path for path in here.runs.rglob("*")) == before


def test_rm_removes_a_lost_run(here: Place) -> None:
    write_run(here.runs, "a", status="running")  # without a heartbeat
    assert here.here("rm", "a").status == 0
    assert os.listdir(here.runs) == []


def test_rm_restores_a_run_that_is_resumed_in_the_meantime(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a race: the run becomes active between the check and the removal."""
    run = write_run(here.runs, "a")
    rename = os.rename

    def resume_and_rename(source: Path, target: Path) -> None:
        if Path(source) == run.path:
            run.update_result(status="running")
            run.beat()
        rename(source, target)

    monkeypatch.setattr(os, "rename", resume_and_rename)
    assert here.here("rm", "a").status != 0
    assert os.listdir(here.runs) == ["a"]
    assert run.result()["status"] == "running"


@pytest.mark.parametrize(("name", "message"), [("sweep/0", "launch rm sweep"), ("nowhere", "nowhere")])
def test_rm_rejects_trials_and_unknown_runs(name: str, message: str, here: Place) -> None:
    write_run(here.runs, "sweep")
    write_run(here.runs / "sweep", "0")
    done = here.here("rm", name)
    assert done.status == 2
    assert message in done.err
    assert (here.runs / "sweep/0").is_dir()
