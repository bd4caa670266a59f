"""The start check: errors and notes before anything starts, and a model that is unchanged afterwards."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.config import Job
from launcher.engine.callbacks import Run
from launcher.engine.estimate import Estimate, estimate
from launcher.engine.metrics import RESERVED
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError, LaunchError, UserCodeError
from tests.engine import start_toys
from tests.support.engine_ranks import column, make_job, succeed

_TOYS = "tests.engine.start_toys"


def toy_job(model: str, n: int = 200, m: int = 40, batch: int = 20, **more: Any) -> Job:
    """Return a job with classes of `start_toys`; settings that are not of the trainer are arguments of the model."""
    data = {key: more.pop(key) for key in ("collate_draws",) if key in more}
    trainer = {key: more.pop(key) for key in ("microbatch_size", "deterministic", "steps", "compile") if key in more}
    job = make_job(
        model={"_target_": f"{_TOYS}.{model}", **more},
        data={"_target_": f"{_TOYS}.Points", "n": n, "m": m, **data},
        global_batch_size=batch,
        **trainer,
    )
    return replace(job, trust=[_TOYS])


def checked(model: str, workers: int = 2, **more: Any) -> Estimate:
    return estimate(toy_job(model, **more), workers=workers)


def refused(model: str, workers: int = 2, **more: Any) -> str:
    with pytest.raises(LaunchError) as caught:
        checked(model, workers, **more)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- metrics --------------------------------------------------------------------------------------------------------

WRONG = (
    *("list", "tuple", "tensors", "pair per sample", "count per sample", "sum per sample", "scalar", "float"),
    *("complex", "complex pair", "array", "no count", "text"),
)


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_metric_that_fails_or_turns_wrong_at_another_size_is_refused(kind: str, where: str) -> None:
    assert '"metric"' in refused("Metric", kind=kind, where=where)


@pytest.mark.parametrize("kind", ["list", "tuple", "sum per sample"])
def test_also_where_every_microbatch_has_two_samples(kind: str) -> None:
    assert '"metric"' in refused("Metric", kind=kind, microbatch_size=2)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["integer", "bool", "bfloat16", "pair", "list pair", "nan", "vector"])
def test_a_metric_that_passes_is_right(kind: str, exact: bool, tmp_path: Path) -> None:
    job = toy_job("Metric", kind=kind, where="validation_step", microbatch_size=7, steps=1, deterministic=exact)
    assert estimate(job, workers=2).notes == ()
    succeed(job, tmp_path, 2)
    if kind == "vector":
        return
    found, loss = column(tmp_path, "val/metric")[0], column(tmp_path, "val/loss")[0]
    if kind == "nan":
        assert found is None or found != found
    elif kind in ("integer", "bool"):
        assert 0 < found < 1
        assert round(found * 40, 6) == round(found * 40)
    else:
        assert found == pytest.approx(loss, rel=5e-3 if kind == "bfloat16" else 1e-6)


@pytest.mark.parametrize("where", ["training_step", "validation_step", "summarize"])
@pytest.mark.parametrize("name", sorted(RESERVED))
def test_names_of_the_engine_are_refused(name: str, where: str) -> None:
    assert re.search(rf'\b{where}\b.*"{name}".*"my_{name}"', refused("Named", name=name, where=where))


def test_names_of_the_engine_are_refused_in_callbacks() -> None:
    progress = Progress()
    model = start_toys.Regression()
    run = Run(model, torch.optim.SGD(model.parameters()), progress, Runtime.single("cpu"), Path(), 100)
    progress.metrics["val/loss"] = 1.0
    for tag in (*RESERVED, *(f"train/{name}" for name in RESERVED), "val/loss"):
        with pytest.raises(UserCodeError, match=rf'run\.log: "{tag}" .*"own/{tag}"'):
            run.log({tag: 1.0})
    run.log({"own/step": 1.0, "val/other": 2.0})
    assert run._logged == {"own/step": 1.0, "val/other": 2.0}


# ---- batch-mates ----------------------------------------------------------------------------------------------------


def test_a_loss_that_depends_on_batch_mates_is_noted_once() -> None:
    (note,) = checked("Contrastive").notes
    assert '"loss"' in note
    assert "scaling.workers=1" in note
    (note,) = checked("Regression", norm="own").notes
    assert '"loss"' in note
    (note,) = checked("Metric", kind="mean").notes
    assert '"metric"' in note
    (note,) = checked("Metric", kind="mean", where="validation_step").notes
    assert "validation_step" in note


def test_a_loss_that_does_not_depend_on_batch_mates_is_not_noted() -> None:
    assert checked("Regression").notes == ()
    assert checked("Regression", dropout=0.5).notes == ()
    assert checked("Regression", norm="BatchNorm1d").notes == (), "the note about the layer is a different one"
    assert checked("Regression", collate_draws=True).notes == (), "the parts are different batches than the whole"
    assert checked("Contrastive", noise=True).notes == (), "random numbers prevent the comparison"
    assert checked("Pairwise", n=200, m=40).notes == ()
    assert checked("Regression", n=2, m=1, batch=2).notes == ()


# ---- shares ---------------------------------------------------------------------------------------------------------


def test_a_share_of_one_sample_that_the_model_refuses_is_refused() -> None:
    message = refused("Regression", norm="BatchNorm1d", n=202)
    assert re.search(r" 2 .* 1 and 1\b", message)
    assert "Expected more than 1 value per channel" in message
    advised = int(message.partition("trainer.global_batch_size=")[2].partition(",")[0])
    assert checked("Regression", norm="BatchNorm1d", n=202, batch=advised).notes == ()


def test_a_share_of_one_sample_of_accumulation_is_rejected() -> None:
    for job in ({"microbatch_size": 3}, {"workers": 1, "n": 41}):  # 10 = 3 + 3 + 3 + 1
        assert "Expected more than 1 value per channel" in refused("Regression", norm="BatchNorm1d", **job)


def test_a_share_that_does_not_occur_is_accepted() -> None:
    checked("Regression", norm="BatchNorm1d", n=202, workers=1)
    checked("Regression", norm="BatchNorm1d", n=202, steps=10)
    checked("Regression", norm="BatchNorm1d", n=202, deterministic=True)
    checked("Regression", norm="own", n=202)  # accepts one sample


# ---- collectives ----------------------------------------------------------------------------------------------------


def test_a_collective_under_unequal_shares_is_refused() -> None:
    message = refused("Together", n=501, batch=64)
    assert re.search(r"training_step .*torch\.distributed\.all_gather\b.* 27 and 26\b", message)
    assert " 21 and 20" in refused("Together", m=41)
    assert "torch.distributed.all_gather" in refused("Together", kind="objects", n=501, batch=1, workers=2)


@pytest.mark.parametrize("kind", ["padded", "padded by maximum", "all_reduce"])
def test_a_collective_of_equal_shape_on_all_ranks_is_accepted(kind: str) -> None:
    checked("Together", kind=kind, n=501, m=41, batch=64)
    assert " 1 and 0" in refused("Together", kind=kind, n=501, batch=20), "one worker does not call it"


def test_the_trial_group_is_gone_afterwards() -> None:
    checked("Together")
    assert not dist.is_initialized()
    checked("Together", 1, n=501, batch=64)


# ---- what is ignored ------------------------------------------------------------------------------------------------


def test_methods_of_other_trainers_are_named_once() -> None:
    (note,) = checked("Lightning").notes
    for name in ("configure_optimizers", "on_validation_epoch_end", "train_dataloader"):
        assert name in note
    for instead in ("`optimizer` and `scheduler`", "`summarize(totals)`", "`data`"):
        assert instead in note


def test_a_model_without_a_training_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\._target_=.*ForwardOnly.*training_step\(batch\)"):
        checked("ForwardOnly")
