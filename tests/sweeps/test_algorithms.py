"""Samplers and pruners by name and by `_target_`, with their options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from sweep_fixtures import PROJECT, Sweep

from launcher.config import SweepConfig
from launcher.errors import ConfigError, RequestError, TrustError
from launcher.jobs.prepare import Request
from launcher.sweeps import algorithms
from launcher.sweeps.space import IntervalAxis, SearchSpace
from launcher.sweeps.specification import SweepSpec, read_sweep
from launcher.sweeps.study import Objective, Study, SweepRecord

SPACE = SearchSpace((), (IntervalAxis("lr", 0.1, 1.0), IntervalAxis("width", 1, 8, whole=True)))
INTERVAL = "optimizer.lr=interval(0.1,0.9)"


def read(words: list[str], *more: str) -> SweepSpec:
    return read_sweep(Request([*words, "sweep.trials=2", INTERVAL, *more], PROJECT))


@pytest.mark.parametrize("name", sorted(algorithms.known("sampler").keys() - {"grid"}))
def test_every_sampler_that_is_offered_samples_trials(tmp_path: Path, name: str) -> None:
    """Would be wrong: a name in the list of an error message that a sweep cannot use."""
    settings = SweepConfig(sampler=name, trials=4)
    (tmp_path / "s").mkdir()
    objectives = [Objective("val/loss", "min")]
    study = Study(tmp_path / "s", SPACE, settings, objectives, 4, None, SweepRecord((), None))
    for number in range(4):
        assert study.ask() == number
        study.finish(number, "completed", [float(number)], {})
    assert len({trial.params["lr"] for trial in study.frozen()}) == 4


@pytest.mark.parametrize("name", sorted(algorithms.known("pruner")))
def test_every_pruner_that_is_offered_is_created(name: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "PatientPruner": {"wrapped_pruner": "MedianPruner", "patience": 2},
        "PercentilePruner": {"percentile": 25.0},
        "ThresholdPruner": {"upper": 1.0},
    }
    settings = SweepConfig(pruner=name, pruner_options=options.get(name, {}))
    assert isinstance(algorithms.pruner(settings, 9), algorithms.known("pruner")[name])


def test_options_reach_the_class_and_replace_the_defaults() -> None:
    settings = SweepConfig(sampler="tpe", sampler_options={"multivariate": True, "seed": 7}, pruner="median")
    created: dict[str, Any] = {}

    class Recorded(optuna.samplers.TPESampler):
        def __init__(self, multivariate: bool = False, seed: int | None = None) -> None:
            created.update(multivariate=multivariate, seed=seed)
            super().__init__(seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(algorithms._SHORT["sampler"], "tpe", Recorded)
        algorithms.sampler(settings, SPACE, 3)
        assert created == {"multivariate": True, "seed": 7}
        algorithms.sampler(SweepConfig(sampler="tpe", seed=5), SPACE, 0)
        assert created == {"multivariate": False, "seed": 5}


def test_classes_of_the_user_run(sweep: Sweep) -> None:
    found = sweep(
        INTERVAL,
        "sweep.sampler={_target_:own_sampler.Fixed,fraction:0.5}",
        "sweep.pruner={_target_:own_sampler.EveryTrial}",
        "logging.tensorboard=false",
        trials=1,
    )
    (trial,) = found["trials"]
    assert trial["state"] == "pruned"
    assert trial["optimizer.lr"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("more", "kind", "named"),
    [
        (["sweep.sampler=tpee"], ConfigError, ["tpee", "tpe", "cmaes", "QMCSampler", "NSGAIIISampler"]),
        (["sweep.sampler=GridSampler"], ConfigError, ["GridSampler", "grid"]),
        (["sweep.pruner=Percentile"], ConfigError, ["Percentile", "PercentilePruner", "hyperband"]),
        (["sweep=tpe", "sweep.sampler_options={multivariat:true}"], ConfigError, ["multivariat", "multivariate"]),
        (["sweep=tpe", "sweep.pruner=PercentilePruner"], ConfigError, ["percentile"]),
        (
            ["sweep=tpe", "sweep.pruner=PercentilePruner", "sweep.pruner_options={percentile:101}"],
            ConfigError,
            ["sweep.pruner_options", "101"],
        ),
        (["sweep.sampler={_target_:own_sampler.Fixed}"], ConfigError, ["fraction"]),
        (["sweep.sampler={_target_:own_sampler.Fixed,fraction:2}"], ConfigError, ["fraction 2"]),
        (["sweep.sampler={_target_:own_sampler.EveryTrial}"], TrustError, ["own_sampler.EveryTrial", "BaseSampler"]),
        (["sweep.sampler={_target_:os.system}"], TrustError, ["os.system"]),
        (["sweep.sampler={_target_:optuna.samplers.TPESampler}"], TrustError, ["trust=[optuna]"]),
        (["sweep.sampler={fraction:2}"], ConfigError, ["sweep.sampler", "fraction"]),
        (["sweep.sampler=3"], ConfigError, ["sweep.sampler", "3"]),
    ],
)
def test_unknown_names_and_options_are_rejected(
    words: list[str], tmp_path: Path, more: list[str], kind: type[RequestError], named: list[str]
) -> None:
    with pytest.raises(kind) as found:
        read(words, *more)
    assert found.value.exit_status == 2
    assert all(word in str(found.value) for word in named), str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_a_trusted_class_is_found(words: list[str]) -> None:
    chosen = "sweep.sampler={_target_:optuna.samplers.TPESampler,multivariate:true}"
    assert read(words, chosen, "trust=[optuna]").summary().count("TPESampler") == 1
