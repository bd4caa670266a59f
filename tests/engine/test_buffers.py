"""The buffers of all ranks are merged for evaluation, checkpoints and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import Job
from launcher.engine.buffers import Buffers, rules_of
from launcher.engine.checkpoint import newest_intact
from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError, TrainingError
from tests.engine import model_toys as toys
from tests.support.engine_ranks import (
    Rank,
    Script,
    assert_same_run,
    assert_same_weights,
    column,
    final_weights,
    make_job,
    on_ranks,
    succeed,
)

DATA = {"_target_": "Points", "train": 310, "val": 53}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "exact": {"deterministic": True},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "local_sgd": {"strategy": {"name": "local_sgd", "inner_steps": 4}},
    "diloco": {"strategy": {"name": "diloco", "inner_steps": 4, "overlap_steps": 1}},
    "bf16": {"strategy": {"compression": "bf16"}},
    "powersgd": {"strategy": {"compression": "powersgd", "powersgd_after": 1}},
}


def job_of(how: dict[str, Any], **model: Any) -> Job:
    given = {"_target_": f"{toys.HERE}.Collecting", **model}
    job = make_job(**{"model": given, "data": DATA, "steps": 7, "global_batch_size": 31, **how})
    return replace(job, trust=[*job.trust, toys.HERE])


def buffers_of(rank: Rank) -> dict[str, torch.Tensor]:
    return {name: value for name, value in rank.weights.items() if not name.endswith(("weight", "bias"))}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_loss_of_a_run_equals_the_loss_of_its_checkpoint(kind: str, tmp_path: Path) -> None:
    job = job_of({**STRATEGIES[kind], "evaluate_every": 3, "checkpoint": {"monitor": None}})
    succeed(job, tmp_path, 2)
    losses = column(tmp_path, "val/loss")
    assert len(losses) == 3
    path = newest_intact(tmp_path / "checkpoints").path
    (found,) = succeed(job, tmp_path / "again", 1, action="evaluate", weights=str(path))
    assert found.result["val/loss"] == pytest.approx(losses[-1], abs=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "diloco"])
def test_a_stopped_and_resumed_run_has_the_buffers_of_an_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    job = job_of({**STRATEGIES[kind], "evaluate_every": 6, "steps": 9, "checkpoint": {"every": 4}})
    whole = succeed(job, tmp_path / "whole", 2)
    for stop in (2, 5):  # steps without evaluation and save
        succeed(job, tmp_path / "stopped", 2, scripts=Script(stop_after=stop))
    resumed = succeed(job, tmp_path / "stopped", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    for one, other in zip(whole, resumed, strict=True):
        assert_same_weights(buffers_of(one), buffers_of(other))
    assert_same_weights(*map(buffers_of, whole))


def test_buffers_of_ranks_differ_until_they_are_merged_and_another_number_of_ranks_loads_the_merged_ones(
    tmp_path: Path,
) -> None:
    job = job_of({"steps": 3, "evaluate_every": 100})
    ranks = succeed(replace(job, trainer=replace(job.trainer, steps=5)), tmp_path, 2, scripts=Script(stop_after=3))
    means = [rank.weights["norm.running_mean"] for rank in ranks]
    assert not torch.equal(*means), "a stop must not merge buffers"
    saved = final_weights(tmp_path)
    assert torch.allclose(saved["norm.running_mean"], torch.stack(means).mean(0), atol=1e-7)
    assert torch.equal(saved["codes"], ranks[0].weights["codes"])
    (one,) = succeed(job, tmp_path, 1)  # three steps are done: the run loads the checkpoint and ends
    assert_same_weights(one.weights, saved)


# ---- the rules ------------------------------------------------------------------------------------------------------


def _merge(runtime: Runtime, rules: dict[str, str], grows: bool) -> Any:
    torch.manual_seed(1)
    model = toys.Collecting(rules, grows)
    x = torch.linspace(2 * runtime.rank - 1, 2 + 5 * runtime.rank, 12 * (3 + runtime.rank)).view(-1, 12)
    model.hidden(x)
    buffers = Buffers(model, runtime)
    before = buffers.copy()
    try:
        buffers.merge()
    except TrainingError as error:
        return str(error)
    assert buffers.merged() == {}
    return before, buffers.copy()


def test_each_buffer_is_merged_by_its_rule() -> None:
    rules = {"top": "max", "low": "mean", "norm.num*": "max"}
    (one, merged), (two, also), (three, _) = on_ranks(_merge, 3, rules, True)
    assert_same_weights(merged, also)
    assert one["seen"].shape != two["seen"].shape
    for name in ("norm.running_mean", "norm.running_var", "low"):
        mean = torch.stack([own[name].double() for own in (one, two, three)]).mean(0)
        assert torch.allclose(merged[name].double(), mean, rtol=1e-2 if name == "low" else 1e-6)
    assert torch.equal(merged["top"], three["top"])
    for name in ("codes", "seen", "norm.num_batches_tracked"):
        assert torch.equal(merged[name], one[name])


def test_merging_unequal_shapes_is_an_error_on_every_rank() -> None:
    answers = on_ranks(_merge, 2, {"seen": "max"}, True)
    assert all('"seen"' in answer and '"max"' in answer for answer in answers)


@pytest.mark.parametrize(
    ("rules", "words"),
    [({"top": "sum"}, '"top" .*"sum"'), ({"tops": "max"}, '"tops".*"top"'), (["top"], r'"first"; .*\blist\b')],
    ids=["rule", "pattern", "kind"],
)
def test_invalid_rules_are_rejected(rules: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^merge_buffers .*{words}"):
        rules_of(toys.Collecting(rules))
