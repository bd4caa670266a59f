"""Swept keys that only some options of a swept group have, and settings that swept experiments must agree on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweep_fixtures import PROJECT, Sweep, table

from launcher import cli
from launcher.errors import ConfigError
from launcher.jobs.prepare import Request
from launcher.sweeps.specification import SweepSpec, read_sweep

THREE = [
    ["optimizer=sgd", "optimizer.momentum=0.5"],
    ["optimizer=sgd", "optimizer.momentum=0.9"],
    ["optimizer=adamw"],
]


def spec_of(words: list[str], *more: str, project: Path = PROJECT) -> SweepSpec:
    return read_sweep(Request([*words, *more], project))


def test_a_grid_has_a_combination_once_for_an_option_without_the_key(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Would be wrong: AdamW trained twice, or an error after the trials of SGD."""
    swept = ["experiment=plain", "optimizer=sgd,adamw", "optimizer.momentum=0.5,0.9"]
    assert cli.run(["plan", "-m", "--json", "--config-dir", str(PROJECT), *words, *swept]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["trials"], plan["grid"]) == (3, THREE)
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_the_words_does_not_matter(words: list[str]) -> None:
    spec = spec_of(words, "experiment=plain", "optimizer.momentum=0.5,0.9", "optimizer=adamw,sgd")
    assert spec.total == 3
    assert spec.space.conditions["optimizer.momentum"].values == ("sgd",)


def test_trials_of_a_grid_with_conditions_run(sweep: Sweep) -> None:
    found = sweep("experiment=plain", "optimizer=sgd,adamw", "optimizer.momentum=0.5,0.9", "run.name=s")
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 3
    assert [row["optimizer.momentum"] for row in table(found["directory"])] == ["0.5", "0.9", ""]
    again = sweep("run.name=s", "run.resume=true")
    assert again["trials"] == found["trials"]


def test_a_search_samples_the_key_only_for_options_that_have_it(sweep: Sweep) -> None:
    swept = ("optimizer.momentum=interval(0.1,0.9)", "optimizer=sgd,adamw")
    found = sweep("experiment=plain", "sweep=random", *swept, trials=5)
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * 5
    sampled = {trial["optimizer"]: "optimizer.momentum" in trial for trial in found["trials"]}
    assert sampled == {"sgd": True, "adamw": False}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["optimizer=sgd,adamw", "optimizer.momentum=0.5"], "optimizer.momentum"),
        (["optimizer=adamw,adam", "optimizer.momentum=0.5,0.9"], "optimizer.momentum"),
        (["optimizer=sgd,adamw", "optimizer.momentums=0.5,0.9"], "optimizer.momentums"),
        (["optimizer=sgd,adamw", "optimizer.momentum=0.5,0.9", "sweep.over=optimizer.momentum"], "sweep.over"),
    ],
)
def test_a_key_that_no_trial_or_not_every_trial_has_is_rejected(
    sweep: Sweep, tmp_path: Path, more: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        sweep("experiment=plain", *more)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_strategy_are_conditional_too(words: list[str]) -> None:
    spec = spec_of(
        words, "experiment=plain", "trainer.deterministic=false", "strategy=ddp,local_sgd", "strategy.inner_steps=4,8"
    )
    assert spec.total == 3


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two more experiments, for the tests to extend."""
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    line = (project / "experiment" / "line.yaml").read_text()
    for name in ("first", "second"):
        (project / "experiment" / f"{name}.yaml").write_text(line)
    return project


def append(project: Path, experiment: str, text: str) -> None:
    with (project / "experiment" / f"{experiment}.yaml").open("a") as file:
        file.write(f"\n{text}\n")


@pytest.mark.parametrize(
    ("texts", "key"),
    [
        (["hydra: {sweeper: {params: {optimizer.lr: '0.1,0.2'}}}", "vars: {x: 1}"], "hydra.sweeper.params"),
        (["sweep: {sampler: tpe}", "sweep: {sampler: random}"], "sweep.sampler"),
        (["checkpoint: {monitor: train/loss}", "vars: {x: 1}"], "checkpoint.monitor"),
        (["run: {name: mine}", "vars: {x: 1}"], "run.name"),
    ],
)
def test_experiments_with_different_settings_of_the_sweep_are_rejected_by_name(
    words: list[str], project: Path, tmp_path: Path, texts: list[str], key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Would be wrong: the settings of the experiment that happens to be first, for all trials."""
    for name, text in zip(("first", "second"), texts, strict=True):
        append(project, name, text)
    more = ["sweep.trials=2"] if "sampler" in texts[0] else []
    asked = [*words[1:], "experiment=first,second", "trainer.seed=0,1", *more]
    assert cli.run(["-m", "--config-dir", str(project), *asked]) == 2
    error = capfd.readouterr().err
    assert all(name in error for name in (key, "experiment=first", "experiment=second"))
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_name_and_root_of_an_experiment_apply_to_the_sweep(words: list[str], project: Path, tmp_path: Path) -> None:
    append(project, "first", f"run: {{root: {tmp_path}/big, name: mine}}")
    spec = spec_of(["experiment=first", "cluster=none"], "trainer.seed=0,1", project=project)
    assert spec.directory.path == tmp_path / "big" / "mine"
    typed = spec_of(["experiment=first", "cluster=none"], "trainer.seed=0,1", "run.name=typed", project=project)
    assert typed.directory.path == tmp_path / "big" / "typed"
