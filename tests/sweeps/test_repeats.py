"""Repeats of trials (`sweep.over`): which is best, mean and spread, resume; and the exit status of failed trials."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sweep_fixtures import PROJECT, Sweep, result, table

from launcher import cli
from launcher.config import SweepConfig
from launcher.errors import ConfigError
from launcher.sweeps.space import ChoiceAxis, SearchSpace
from launcher.sweeps.study import Objective, Study, SweepRecord

RATES = ChoiceAxis("lr", (0.1, 0.2), ("0.1", "0.2"))
SEEDS = ChoiceAxis("seed", (0, 1, 2), ("0", "1", "2"))
SPACE = SearchSpace((), (SEEDS, RATES), over=("seed",))


def study_of(directory: Path, settings: SweepConfig, total: int = 6, new: bool = True) -> Study:
    directory.mkdir(exist_ok=True)
    start = SweepRecord((), None) if new else None
    return Study(directory, SPACE, settings, [Objective("val/loss", "min")], total, None, start)


def run(study: Study, objectives: Mapping[tuple[float, int], float | None], most: int = 99) -> list[dict[str, Any]]:
    """Run trials of a study with these objectives by (lr, seed), None for a failure; return their values."""
    seen: list[dict[str, Any]] = []
    while len(seen) < most and (number := study.ask()) is not None:
        values = study.values(study.frozen()[number])
        objective = objectives[values["lr"], values["seed"]]  # type: ignore[index]
        seen.append(values)
        if objective is None:
            study.finish(number, "failed", None, {})
        else:
            study.finish(number, "completed", [objective], {})
    return seen


GOOD_MEAN = {(0.1, 0): 1.0, (0.1, 1): 1.1, (0.1, 2): 1.2, (0.2, 0): 0.5, (0.2, 1): 3.0, (0.2, 2): 3.0}


def test_the_best_has_the_best_mean_and_not_the_best_trial(tmp_path: Path) -> None:
    study = study_of(tmp_path / "s", SweepConfig())
    seen = run(study, GOOD_MEAN)
    assert [values["seed"] for values in seen] == [0, 1, 2, 0, 1, 2], "repeats follow each other"
    best = study.best()
    assert best is not None
    assert study.values(best) == {"seed": 0, "lr": 0.1}
    repeats = study.repeats_of(best.number)
    assert repeats is not None
    assert repeats.mean == pytest.approx(1.1)
    assert repeats.spread == pytest.approx(0.1)


@pytest.mark.parametrize(("changed", "rate"), [({(0.1, 0): None}, 0.2), ({(0.1, 0): None, (0.2, 1): None}, 0.1)])
def test_a_combination_with_a_failed_repeat_wins_only_against_others_like_it(
    tmp_path: Path, changed: dict[tuple[float, int], float | None], rate: float
) -> None:
    study = study_of(tmp_path / "s", SweepConfig())
    run(study, {**GOOD_MEAN, **changed})
    best = study.best()
    assert best is not None
    assert best.params["lr"] == rate


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_repeats_each_combination_also_after_a_resume(tmp_path: Path, sampler: str) -> None:
    settings = SweepConfig(sampler=sampler, trials=3)
    before = run(study_of(tmp_path / "s", settings, 9), GOOD_MEAN, most=4)
    after = run(study_of(tmp_path / "s", settings, 9, new=False), GOOD_MEAN)
    seen = before + after
    assert len(seen) == 9
    assert [values["seed"] for values in seen] == [0, 1, 2] * 3
    assert all(seen[i]["lr"] == seen[i - i % 3]["lr"] for i in range(9))


def test_mean_and_spread_are_in_every_file_of_the_sweep(sweep: Sweep) -> None:
    found = sweep("optimizer.lr=0.1,0.5", "model.start=1,2,4", "sweep.over=model.start", "run.name=s")
    rows = table(found["directory"])
    assert list(rows[0])[:5] == ["number", "state", "objective", "mean", "spread"]
    for rate in ("0.1", "0.5"):
        own = [row for row in rows if row["optimizer.lr"] == rate]
        objectives = [float(row["objective"]) for row in own]
        assert len(own) == 3
        assert [float(row["mean"]) for row in own] == pytest.approx([statistics.fmean(objectives)] * 3)
        assert [float(row["spread"]) for row in own] == pytest.approx([statistics.stdev(objectives)] * 3)
    best = found["best"]
    assert (best["parameters"]["optimizer.lr"], best["repeats"]) == (0.5, 3)
    assert result(found["directory"])["best"]["mean"] == best["mean"]
    assert f"mean: {best['mean']}" in (Path(found["directory"]) / "best.yaml").read_text()
    assert "val/loss over model.start" in (Path(found["directory"]) / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "key", "quoted"),
    [
        (["sweep.over=trainer.seed"], "sweep.over", r"trainer\.seed=range\(3\)"),
        (
            ["trainer.seed=int(interval(0,9))", "sweep=random", "sweep.trials=2", "sweep.over=trainer.seed"],
            "sweep.over",
            r"trainer\.seed=A,B",
        ),
        (
            ["trainer.seed=0,1", "sweep.over=trainer.seed", "sweep.metric=[val/loss,val/size]"],
            "sweep.over",
            r"sweep\.metric",
        ),
        (["trainer.seed=0,1", "sweep.over=3"], "sweep.over", " 3,"),
        (["sweep.exit=never"], "sweep.exit", "any_failed"),
    ],
)
def test_repeats_that_cannot_be_are_rejected(
    sweep: Sweep, tmp_path: Path, more: list[str], key: str, quoted: str
) -> None:
    with pytest.raises(ConfigError, match=quoted) as refused:
        sweep("optimizer.lr=0.1,0.2", *more)
    assert refused.value.key == key
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("more", "status"), [([], 0), (["sweep.exit=any_failed"], 1)])
def test_the_exit_status_of_a_sweep_with_a_failed_trial(
    words: list[str], more: list[str], status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [*words, "optimizer.lr=0.1,1e30", "trainer.epochs=2", *more]
    assert cli.run(["-m", "--config-dir", str(PROJECT), *asked]) == status
    assert ("sweep.exit=any_failed" in capfd.readouterr().err) is (status == 0), "the option is named where it helps"
