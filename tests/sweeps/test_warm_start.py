"""Sweeps that start with the completed trials of another sweep (`sweep.warm_start`)."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from sweep_fixtures import PROJECT, Sweep, result, table

from launcher.config import SweepConfig
from launcher.errors import ConfigError, RequestError, RunError
from launcher.jobs.prepare import Request
from launcher.runs import RunDirectory
from launcher.sweeps.space import ChoiceAxis, IntervalAxis, SearchSpace
from launcher.sweeps.specification import SweepSpec, read_sweep
from launcher.sweeps.study import PRIOR, Objective, Study, SweepRecord, load

RATES = IntervalAxis("optimizer.lr", 0.01, 1)
STARTS = ChoiceAxis("model.start", (1, 2, 3), ("1", "2", "3"), step=1)
SPACE = ("optimizer.lr=interval(0.01,1)", "model.start=range(1,4)")
TOTAL = 12


def study_of(directory: Path, sampler: str, total: int, prior: tuple[optuna.trial.FrozenTrial, ...] = ()) -> Study:
    settings = SweepConfig(sampler=sampler, trials=total)
    space, objectives = SearchSpace((), (RATES, STARTS)), [Objective("val/loss", "min")]
    return Study(directory, space, settings, objectives, total, None, SweepRecord((), None), prior)


@pytest.fixture
def other(tmp_path: Path) -> RunDirectory:
    """The record of a sweep with 12 completed trials and a failed one, without their runs."""
    run = RunDirectory(tmp_path / "other")
    run.create()
    run.write_result({"status": "completed"})
    study = study_of(run.path, "random", TOTAL + 1)
    for _ in range(TOTAL):
        number = study.ask()
        assert number is not None
        study.finish(number, "completed", [10.0 + number], {})
    assert study.ask() == TOTAL
    study.finish(TOTAL, "failed", None, {})
    return run


def read(words: list[str], *more: str) -> SweepSpec:
    return read_sweep(Request([*words, "sweep.trials=2", "sweep.warm_start=other", *more], PROJECT))


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_samplers_learn_from_completed_trials_of_another_sweep(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Would be wrong: a search that begins with random values, as without the prior trials."""
    spec = read(words, f"sweep={sampler}", *SPACE)
    assert len(spec.prior) == TOTAL
    (tmp_path / "s").mkdir()
    study = study_of(tmp_path / "s", sampler, 2, spec.prior)

    def fail(*_: object) -> None:
        raise AssertionError("a random value")

    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", fail)
    assert [study.ask(), study.ask(), study.ask()] == [0, 1, None]
    assert [trial.number for trial in study.frozen()] == [0, 1]


@pytest.mark.usefixtures("other")
def test_prior_trials_are_not_among_those_of_the_sweep(sweep: Sweep) -> None:
    """Would be wrong: prior trials in the table, as the best, or a second time after a resume."""
    more = (*SPACE, "sweep=tpe", "sweep.warm_start=other", "logging.tensorboard=false", "run.name=s")
    found = sweep(*more, trials=1)
    again = sweep("run.name=s", "run.resume=true", trials=2)

    assert [row["number"] for row in table(again["directory"])] == ["0", "1"]
    assert again["trials"][:1] == found["trials"]
    assert again["best"]["objective"] == min(trial["objective"] for trial in again["trials"])
    assert result(again["directory"], 1)["trial"]["number"] == 1
    journal = load(Path(again["directory"])).trials
    assert [trial.user_attrs.get(PRIOR) for trial in journal] == ["other"] * TOTAL + [None] * 2
    with pytest.raises(RunError) as error:
        sweep("run.name=s", "run.resume=true", "sweep.warm_start=s", trials=3)
    assert "sweep.warm_start=s" in str(error.value)


def test_only_trials_within_the_search_space_are_used(words: list[str], other: RunDirectory) -> None:
    """Values are compared and not distributions, so that a grid is of use to a search."""
    inside = sum(
        0.3 <= trial.params["optimizer.lr"] <= 0.8 and trial.params["model.start"] != 3
        for trial in load(other.path).trials[:TOTAL]
    )
    spec = read(words, "sweep=tpe", "optimizer.lr=tag(log,interval(0.3,0.8))", "model.start=1,2,4")
    assert 0 < len(spec.prior) == inside < TOTAL
    assert spec.warm_start is not None
    assert spec.warm_start.completed == TOTAL


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize(
    ("more", "kind", "named"),
    [
        (["optimizer.lr=interval(0.01,1)"], ConfigError, ["other", "model.start"]),
        ([*SPACE, "vars.a=0,1"], ConfigError, ["other", "vars.a"]),
        (["optimizer.lr=interval(2,3)", "model.start=1,2"], ConfigError, ["other", "optimizer.lr"]),
        ([*SPACE, "sweep.metric=val/size"], ConfigError, ["val/loss", "val/size"]),
        ([*SPACE, "sweep.direction=max"], ConfigError, ["min", "max"]),
        ([*SPACE, "sweep=random"], ConfigError, ["sweep.warm_start", "sweep=random"]),
        ([*SPACE, "sweep.warm_start=othr"], RunError, ["othr", "other"]),
        ([*SPACE, "sweep.warm_start=single"], RunError, ["single"]),
        ([*SPACE, "sweep.warm_start=../x"], RequestError, [".."]),
    ],
)
def test_another_space_or_objective_is_rejected(
    words: list[str], tmp_path: Path, more: list[str], kind: type[RequestError], named: list[str]
) -> None:
    single = RunDirectory(tmp_path / "single")
    single.create()
    single.write_result({"status": "completed"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as found:
        read(words, "sweep=tpe", *more)
    assert found.value.exit_status == 2
    assert all(word in str(found.value) for word in named)
    assert sorted(tmp_path.rglob("*")) == before
