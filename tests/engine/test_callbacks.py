"""Callbacks: their calls, averaged weights, early stopping, and their state in a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.callbacks import EarlyStopping, Ema, Run, check_callbacks
from launcher.engine.checkpoint import load_weights
from launcher.engine.estimate import estimate
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError, TrustError
from tests.support import engine_toys as toys
from tests.support.engine_ranks import (
    Rank,
    Script,
    assert_same_run,
    assert_same_weights,
    column,
    kill,
    launch,
    logged,
    make_job,
    result_of,
    succeed,
)

EMA = {"_target_": "launcher.engine.callbacks.Ema", "decay": 0.9}
EARLY = {"_target_": "launcher.engine.callbacks.EarlyStopping", "patience": 2}


def some_run(model: torch.nn.Module, progress: Progress) -> Run:
    return Run(model, torch.optim.SGD(model.parameters()), progress, Runtime.single("cpu"), Path(), 100)


def called(rank: Rank, what: str) -> list[tuple[int, ...]]:
    return [entry[2:] for entry in rank.record if entry[0] == what]


# ---- calls of a callback ---------------------------------------------------------------------------------------------


def test_a_callback_is_called_on_every_rank_and_can_log(tmp_path: Path) -> None:
    ranks = succeed(make_job(epochs=2, callbacks={"own": "Watching"}), tmp_path, 2)
    for rank in ranks:
        assert called(rank, "on_start") == [(0, 0, 0, 0)]
        assert [step for step, *_ in called(rank, "on_step")] == list(range(1, 23))
        assert called(rank, "on_step")[10:12] == [(11, 1, 1037, 11), (12, 1, 1137, 12)]
        assert [step for step, *_ in called(rank, "on_evaluate")] == [11, 22]
        assert called(rank, "on_end") == [(22, 2, 2074, 22)]
    metrics = [[entry[1] for entry in rank.record if entry[0] == "metrics"] for rank in ranks]
    assert metrics[0] == metrics[1] == column(tmp_path, "val/loss")
    assert column(tmp_path, "own/calls") == list(range(2, 23, 2))
    assert set(column(tmp_path, "own/rank")) == {0.0}


def test_on_log_receives_the_values_that_are_written_for_the_step(tmp_path: Path) -> None:
    """Guards against values of the previous log, separate calls for log and evaluation, and ranks without means."""
    job = make_job(epochs=2, log_every=4, evaluate_every=6, callbacks={"own": "Watching"})
    ranks = succeed(job, tmp_path, 2)
    position = ("epoch", "samples", "time", "step")
    written = {
        step: {tag: value for tag, value in entry.items() if tag not in position}
        for step, entry in logged(tmp_path, machine=True).items()
    }
    assert sorted(written) == list(range(2, 23, 2))  # "Watching" logs every second step
    for rank in ranks:
        found = dict(entry[1:] for entry in rank.record if entry[0] == "on_log")
        assert list(found) == sorted(written)
        for step, values in found.items():
            same = [tag for tag in values if tag.startswith(("train/", "val/"))]
            assert {tag: values[tag] for tag in same} == {tag: written[step][tag] for tag in same}
            assert values.keys() == written[step].keys()
    assert dict(entry[1:] for entry in ranks[0].record if entry[0] == "on_log") == written


def test_the_state_of_a_callback_is_restored(tmp_path: Path) -> None:
    job = make_job(epochs=2, callbacks={"own": "Watching"}, checkpoint={"every": 3, "keep": 2})
    kill(job, tmp_path, 2, after=8, once_saved=6)
    ranks = succeed(job, tmp_path, 3)  # another number of workers
    assert called(ranks[2], "on_start") == [(6, 0, 600, 6)]
    assert called(ranks[2], "on_end") == [(22, 2, 2074, 22)]
    # Without that callback, and with another one that the checkpoint does not contain.
    longer = make_job(epochs=3, callbacks={"other": {"_target_": "Ema"} | EMA})
    succeed(longer, tmp_path, 1)
    assert result_of(tmp_path)["steps"] == 33


@pytest.mark.parametrize("failure", ["on_start", "on_step", "on_evaluate", "on_log", "on_end"])
def test_an_exception_of_a_callback_is_reported_with_the_users_traceback(failure: str, tmp_path: Path) -> None:
    own = {"_target_": "Watching", "fails_in": failure}
    (rank,) = launch(make_job(epochs=2, callbacks={"own": own}), tmp_path)
    assert rank.error is not None
    kind, message, trace = rank.error
    assert (kind, message) == ("UserCodeError", f'callbacks.own.{failure}: KeyError: "a callback\'s own mistake"')
    assert "engine_toys.py" in trace
    assert "callbacks.py" not in trace


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_of_one_rank_ends_all_ranks_at_the_same_step(rank: int, tmp_path: Path) -> None:
    own = {"_target_": "Watching", "stop_at": 7, "rank": rank}
    job = make_job(epochs=2, callbacks={"own": own})
    ranks = succeed(job, tmp_path, 2)
    assert [called(one, "on_step")[-1][0] for one in ranks] == [8, 8]
    result = result_of(tmp_path)
    assert (result["status"], result["reason"], result["steps"]) == ("completed", "enough", 8)
    assert Path(result["checkpoint"]).name == "step-00000008"


# ---- ema ------------------------------------------------------------------------------------------------------------


def averaged(directory: Path, section: str | None = None) -> dict[str, torch.Tensor]:
    return load_weights(directory / "checkpoints" / "step-00000022", section)


def test_the_average_follows_the_formula() -> None:
    model = torch.nn.Linear(2, 2)
    ema, run = Ema(decay=0.5), some_run(model, Progress())
    ema.on_start(run)
    expected = model.weight.detach().double().clone()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight += torch.randn(2, 2)
        ema.on_step(run)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.weights()["weight"], expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("workers", "deterministic"), [(1, False), (2, False), (3, True)])
def test_the_average_is_evaluated_and_saved_besides_the_trained_weights(
    workers: int, deterministic: bool, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"model": "Tied", "epochs": 2, "deterministic": deterministic}
    succeed(make_job(**how), tmp_path / "plain", workers)
    succeed(make_job(callbacks={"ema": EMA}, **how), tmp_path / "ema", workers)
    # The average has no effect on training.
    assert column(tmp_path / "plain", "train/loss") == column(tmp_path / "ema", "train/loss")
    assert_same_weights(averaged(tmp_path / "plain"), averaged(tmp_path / "ema", "model"))
    assert column(tmp_path / "plain", "val/loss") != column(tmp_path / "ema", "val/loss")
    weights = averaged(tmp_path / "ema")
    assert torch.equal(weights["tail.weight"], weights["middle.weight"])  # tied
    assert torch.equal(weights["still"], torch.ones(3))
    assert int(weights["seen"]) == int(averaged(tmp_path / "ema", "model")["seen"])
    # Evaluating the checkpoint gives the same loss, and another run starts from the averaged weights.
    path = str(tmp_path / "ema" / "checkpoints" / "step-00000022")
    ranks = succeed(make_job(**how), tmp_path / "again", workers, action="evaluate", weights=path)
    assert ranks[0].result["val/loss"] == column(tmp_path / "ema", "val/loss")[-1]
    assert launch(make_job(**how | {"epochs": 1}), tmp_path / "next", 1, weights=path)[0].error is None


@pytest.mark.parametrize(("deterministic", "workers"), [(False, (2, 2)), (True, (2, 3))])
def test_the_average_of_a_resumed_run_equals_that_of_an_uninterrupted_run(
    deterministic: bool, workers: tuple[int, int], tmp_path: Path
) -> None:
    job = make_job(
        model="Tied",
        epochs=2,
        deterministic=deterministic,
        callbacks={"ema": EMA, "early": EARLY | {"patience": 9}},
        checkpoint={"every": 3, "keep": 2},
        evaluate_every=4,
    )
    succeed(job, tmp_path / "whole", workers[0])
    kill(job, tmp_path / "killed", workers[0], after=8, once_saved=6)
    succeed(job, tmp_path / "killed", workers[1])
    assert_same_run(tmp_path / "whole", tmp_path / "killed")  # the averages
    assert_same_weights(averaged(tmp_path / "whole", "model"), averaged(tmp_path / "killed", "model"))


# ---- early stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "how", "stops_after"),
    [
        ([3, 2, 1, 0.9, 0.8], {}, None),
        ([3, 2, 2, 2, 1], {}, 4),
        ([3, 2, 2.5, 1.9, 2, 2], {}, 6),
        ([3, 2, 1.95, 1.91, 1], {"min_delta": 0.1}, 4),
        ([1, 2, 3, 3, 3], {"mode": "max"}, 5),
        ([1.0, float("nan"), float("nan")], {}, 3),
        ([float("nan"), 5.0, 6.0, 4.0], {}, None),
        ([3, 2, 2], {"patience": 1}, 3),
    ],
)
def test_early_stopping_stops_after_patience_evaluations_without_improvement(
    values: list[float], how: dict[str, Any], stops_after: int | None
) -> None:
    progress = Progress()
    run = some_run(torch.nn.Linear(1, 1), progress)
    stopping = EarlyStopping(**{"patience": 2, **how})
    for number, value in enumerate(values, start=1):
        progress.metrics["val/loss"] = value
        stopping.on_evaluate(run)
        again = EarlyStopping(**{"patience": 2, **how})
        again.load_state_dict(stopping.state_dict())
        stopping = again
        assert (run._reason == "early_stopping") == (stops_after is not None and number >= stops_after)


def test_early_stopping_ends_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    job = make_job(
        epochs=4,
        evaluate_every=3,
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.0},
        callbacks={"early": EARLY, "own": None},
    )
    ranks = succeed(job, tmp_path, 3)
    assert {rank.record[-1] for rank in ranks} == {("step", 9)}  # one improvement, then two evaluations without
    result = result_of(tmp_path)
    assert (result["status"], result["reason"], result["steps"]) == ("completed", "early_stopping", 9)
    assert Path(result["checkpoint"]).name == "step-00000009"
    assert max(logged(tmp_path)) == 9


def test_a_stop_at_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    job = make_job(
        steps=9, evaluate_every=3, optimizer={"_target_": "torch.optim.SGD", "lr": 0.0}, callbacks={"e": EARLY}
    )
    succeed(job, tmp_path, 1)
    assert (result_of(tmp_path)["status"], result_of(tmp_path)["reason"]) == ("completed", None)


def test_a_signal_takes_precedence_over_a_stop_by_a_callback(tmp_path: Path) -> None:
    own = {"_target_": "Watching", "stop_at": 4}
    succeed(make_job(epochs=2, callbacks={"own": own}), tmp_path, 2, scripts={0: Script(stop_after=5)})
    assert (result_of(tmp_path)["status"], result_of(tmp_path)["reason"]) == ("stopped", "signal")


# ---- rejected before the run starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "kind", "words"),
    [
        ({"ema": EMA | {"decay": 1.5}}, ConfigError, r"callbacks.ema.decay=1.5 "),
        ({"ema": EMA | {"dekay": 0.5}}, ConfigError, r'callbacks.ema.dekay .*"decay"'),
        ({"a": EMA, "b": EMA}, ConfigError, r": a \w+ b "),
        ({"early": EARLY | {"patience": 0}}, ConfigError, r"patience=0"),
        (
            {"early": EARLY | {"monitor": "val/los"}},
            ConfigError,
            r"callbacks.early.monitor=val/los .* \"val/loss\"",
        ),
        ({"net": {"_target_": "torch.nn.Linear"}}, TrustError, r"on_start, on_step, on_evaluate, on_log, on_end"),
        ({"out": {"_target_": "shutil.rmtree"}}, TrustError, r'callbacks\.out\._target_ .*"shutil\.rmtree"'),
    ],
)
def test_invalid_callbacks_are_rejected(callbacks: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        estimate(make_job(callbacks=callbacks))


def test_a_callback_set_to_null_is_removed() -> None:
    check_callbacks(make_job(callbacks={"own": "Watching"}), [])
    job = make_job()
    job.callbacks["ema"] = None
    check_callbacks(job, [])
    assert toys.Watching().calls == 0
