"""Every strategy with real gloo ranks: its results, and runs that are stopped, resumed and resized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from launcher.config.schema import Job, StrategyConfig
from launcher.engine.build import build_strategy
from launcher.engine.runtime import Runtime
from launcher.errors import RunError
from launcher.jobs.prepare import check_continuation
from tests.support.engine_ranks import (
    Script,
    assert_same_run,
    assert_same_weights,
    column,
    final_weights,
    kill,
    launch,
    make_job,
    on_ranks,
    result_of,
    succeed,
)
from tests.support.engine_toys import Normed, points

pytestmark = pytest.mark.gpu

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}
DILOCO = {"name": "diloco", "inner_steps": 4}
LOCAL = {"name": "local_sgd", "inner_steps": 4}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "static": {"static_graph": True, "bucket_mb": 0.001},
    "bf16": {"compression": "bf16"},
    "fp16": {"compression": "fp16"},
    "powersgd": {"compression": "powersgd", "powersgd_rank": 1, "powersgd_after": 2},
    "fsdp": {"name": "fsdp", "blocks": ["Linear"]},
    "fsdp-bf16": {"name": "fsdp", "compression": "bf16"},
    "local_sgd": LOCAL,
    "diloco": DILOCO,
    "diloco-overlapped": {**DILOCO, "compression": "bf16", "overlap_steps": 2},
}
# Unequal shares, several microbatches each, a mean over tokens, a norm that clips most gradients.
HARD: dict[str, Any] = {
    "model": {"_target_": "Tokens", "width": 40},
    "epochs": 1,
    "microbatch_size": 20,
    "clip_norm": 0.5,
    "checkpoint": {"every": 3, "keep": 9},
    "scheduler": {"_target_": "launcher.engine.optim.WarmupCosine", "warmup_steps": 5},
}


def job_of(name: str, **more: Any) -> Job:
    return make_job(strategy=STRATEGIES[name], **{**HARD, **more})


# ---- against ddp ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tolerance", "workers"),
    [("static", 1e-6, 2), ("fsdp", 1e-6, 2), ("fsdp", 1e-6, 3), ("bf16", 3e-2, 2), ("fp16", 3e-3, 3)],
)
def test_the_gradient_is_that_of_one_worker(name: str, tolerance: float, workers: int, tmp_path: Path) -> None:
    succeed(job_of("ddp"), tmp_path / "one", 1)
    succeed(job_of(name), tmp_path / "many", workers)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        one, many = column(tmp_path / "one", tag), column(tmp_path / "many", tag)
        assert many == pytest.approx(one, rel=tolerance, abs=tolerance), tag
    weights = final_weights(tmp_path / "many")
    for key, value in final_weights(tmp_path / "one").items():
        assert torch.allclose(weights[key], value, atol=10 * tolerance), key


def test_synchronizing_after_every_step_with_plain_sgd_is_ddp(tmp_path: Path) -> None:
    job = make_job(epochs=1, optimizer=SGD, global_batch_size=101, microbatch_size=20)
    succeed(job, tmp_path / "ddp", 2)
    strategy = StrategyConfig("local_sgd", inner_steps=1)
    succeed(replace(job, strategy=strategy), tmp_path / "local", 2)
    for tag in ("train/loss", "val/loss"):
        assert column(tmp_path / "local", tag) == pytest.approx(column(tmp_path / "ddp", tag), abs=1e-6)


@pytest.mark.parametrize("name", ["powersgd", "diloco", "diloco-overlapped"])
def test_it_learns(name: str, tmp_path: Path) -> None:
    job = replace(make_job(epochs=6, evaluate_every="1ep"), strategy=StrategyConfig(**STRATEGIES[name]))
    ranks = succeed(job, tmp_path, 2)
    losses = column(tmp_path, "train/loss")
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses
    # At the end of the run the workers hold the exported weights.
    for rank in ranks:
        assert_same_weights(rank.weights, final_weights(tmp_path))


def test_a_worker_without_samples_takes_part(tmp_path: Path) -> None:
    # 103 samples in batches of 20: the last has three, for four workers, and the validation set two.
    for name in ("powersgd", "fsdp", "diloco"):
        job = job_of(name, data={"_target_": "Points", "train": 103, "val": 2}, global_batch_size=20, microbatch_size=3)
        succeed(job, tmp_path / name, 4)
        assert result_of(tmp_path / name)["samples"] == 103
    one = job_of("ddp", data={"_target_": "Points", "train": 103, "val": 2}, global_batch_size=20, microbatch_size=3)
    succeed(one, tmp_path / "one", 1)
    assert column(tmp_path / "fsdp", "val/loss") == pytest.approx(column(tmp_path / "one", "val/loss"), abs=1e-6)


def test_sharded_within_a_machine_and_replicated_across(tmp_path: Path) -> None:
    # Two machines with two workers each; the stopped run resumes without sharding, and vice versa.
    job = job_of("fsdp")
    hybrid = replace(job, strategy=replace(job.strategy, hybrid=True))
    succeed(job_of("ddp"), tmp_path / "ddp", 4)
    succeed(hybrid, tmp_path / "hybrid", 4, machines=2)
    succeed(hybrid, tmp_path / "changed", 4, machines=2, scripts=Script(stop_after=4))
    succeed(job_of("ddp"), tmp_path / "changed", 3, scripts=Script(stop_after=8))
    succeed(hybrid, tmp_path / "changed", 4, machines=2)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        for name in ("hybrid", "changed"):
            assert column(tmp_path / name, tag) == pytest.approx(column(tmp_path / "ddp", tag), abs=1e-5), (name, tag)


# ---- stopped and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("bf16", "float32"),
        ("fsdp", "float32"),
        ("local_sgd", "float32"),
        ("diloco-overlapped", "float32"),
        *((name, "float16") for name in ("powersgd", "fsdp-bf16", "diloco")),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(name: str, precision: str, tmp_path: Path) -> None:
    """Killed after step 6, between two synchronizations; with overlap, before the first one is applied."""
    model = {"_target_": "Steep"} if precision == "float16" else {"_target_": "Tokens", "width": 40}
    job = job_of(name, precision=precision, model=model)
    succeed(job, tmp_path / "whole", 2)
    kill(job, tmp_path / "killed", 2, after=7, once_saved=6)
    succeed(job, tmp_path / "killed", 2)
    assert result_of(tmp_path / "killed")["restarts"] == 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("name", ["powersgd", "fsdp", "diloco-overlapped"])
def test_convolutions_resume_exactly(name: str, tmp_path: Path) -> None:
    # Their weights have another memory layout, and FSDP supports only contiguous ones.
    model = {"_target_": "models.vision.ConvNet", "width": 4}
    job = job_of(name, model=model, data={"_target_": "Pictures", "train": 500}, epochs=2)
    succeed(job, tmp_path / "whole", 2)
    kill(job, tmp_path / "killed", 2, after=7, once_saved=6)
    succeed(job, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("name", ["powersgd", "fsdp", "local_sgd", "diloco-overlapped"])
def test_a_run_resumed_with_other_numbers_of_workers_learns(name: str, tmp_path: Path) -> None:
    job = job_of(name, epochs=2, checkpoint={"every": 3, "keep": 9})
    succeed(job, tmp_path / "whole", 2)
    succeed(job, tmp_path / "resized", 2, scripts=Script(stop_after=6))
    succeed(job, tmp_path / "resized", 3, scripts=Script(stop_after=13))
    succeed(job, tmp_path / "resized", 1)
    result = result_of(tmp_path / "resized")
    assert (result["status"], result["world_sizes"], result["samples"]) == ("completed", [2, 3, 1], 2074)
    # Replica strategies synchronize once more for each change, which affects their outer momentum for a while.
    tolerance = 1e-5 if name == "fsdp" else 0.2 if "diloco" in name else 0.05
    assert column(tmp_path / "resized", "val/loss")[-1] == pytest.approx(
        column(tmp_path / "whole", "val/loss")[-1], rel=tolerance
    )


@pytest.mark.parametrize(("first", "second"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_ddp_and_fsdp_continue_one_another(first: str, second: str, tmp_path: Path) -> None:
    succeed(job_of("ddp"), tmp_path / "whole", 2)
    succeed(job_of(first), tmp_path / "changed", 2, scripts=Script(stop_after=6))
    succeed(job_of(second), tmp_path / "changed", 3)
    for tag in ("train/loss", "train/grad_norm"):
        assert column(tmp_path / "changed", tag) == pytest.approx(column(tmp_path / "whole", tag), abs=1e-5)


@pytest.mark.parametrize(
    ("strategy", "continues"),
    [
        (StrategyConfig("fsdp", hybrid=True), True),
        (StrategyConfig("auto"), True),
        (StrategyConfig(static_graph=True), True),
        (StrategyConfig("diloco"), False),
        (StrategyConfig(compression="powersgd"), False),
    ],
)
def test_a_run_resumes_with_a_strategy_that_reads_its_checkpoint(strategy: StrategyConfig, continues: bool) -> None:
    with nullcontext() if continues else pytest.raises(RunError, match='"x"'):
        check_continuation(Job(), Job(strategy=strategy), "x")


def test_the_shared_weights_are_saved_and_evaluated(tmp_path: Path) -> None:
    # Step 6 is between the synchronizations at steps 4 and 8: the weights of step 4 are exported.
    job = job_of("diloco", evaluate_every=2, checkpoint={"every": 2, "keep": 9})
    ranks = succeed(job, tmp_path, 2, scripts=Script(stop_after=6))
    from launcher.engine.checkpoint import load_weights

    saved = {step: load_weights(tmp_path / f"checkpoints/step-{step:08d}") for step in (4, 6)}
    assert_same_weights(saved[4], saved[6])
    losses = dict(zip((2, 4, 6), column(tmp_path, "val/loss"), strict=True))
    assert losses[4] == losses[6] != losses[2]
    assert not torch.equal(ranks[0].weights["head.weight"], ranks[1].weights["head.weight"])
    (evaluated, _) = succeed(job, tmp_path, 2, action="evaluate", weights=str(tmp_path / "checkpoints/step-00000006"))
    assert evaluated.result["val/loss"] == losses[6]


def test_initial_weights_reach_every_strategy(tmp_path: Path) -> None:
    # With a learning rate of zero the weights do not change.
    succeed(job_of("ddp"), tmp_path / "source", 1)
    weights = final_weights(tmp_path / "source")
    torch.save(weights, tmp_path / "weights.pt")
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    for name in ("fsdp", "powersgd", "diloco"):
        succeed(job_of(name, optimizer=still), tmp_path / name, 2, weights=str(tmp_path / "weights.pt"))
        assert_same_weights(final_weights(tmp_path / name), weights)


def prepared(runtime: Runtime, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the state of a network that each rank initialized differently, and whether it drew since."""
    given = []
    for job in jobs:
        torch.manual_seed(runtime.rank)
        model = Normed()
        torch.nn.init.normal_(model.get_buffer("stem.1.running_mean"))
        before = torch.get_rng_state()
        strategy = build_strategy(job, model, runtime)
        strategy.prepare(tuple(part[:20] for part in points(20, runtime.rank)))
        with strategy.whole():
            state = {name: as_whole(value) for name, value in model.state_dict().items()}
        given.append({"drew": not torch.equal(before, torch.get_rng_state()), **state})
    return given


def as_whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def test_all_ranks_start_with_the_weights_and_buffers_of_rank_0() -> None:
    """Would be wrong: running statistics of rank 0 are saved, but other ranks trained with their own."""
    names = ["ddp", "powersgd", "local_sgd", "fsdp"]
    jobs = [make_job(strategy=STRATEGIES[name]) for name in names] + [make_job(deterministic=True)]
    first, *others = on_ranks(prepared, 2, jobs)
    (alone,) = on_ranks(prepared, 1, jobs[:1])
    for name, state, *same in zip([*names, "exact"], first, *others, strict=True):
        assert not state.pop("drew"), name
        for other in same:
            assert not other.pop("drew"), name
            assert_same_weights(state, other)
        assert_same_weights(state, {key: value for key, value in alone[0].items() if key != "drew"})


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_number(tmp_path: Path) -> None:
    succeed(job_of("ddp"), tmp_path / "kept", 2)
    job = job_of("ddp")
    again = replace(job, strategy=StrategyConfig(activation_checkpointing=True, blocks=["Linear"]))
    succeed(again, tmp_path / "again", 2)
    assert_same_run(tmp_path / "kept", tmp_path / "again")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"activation_checkpointing": True}, "no blocks were found"),
        ({"activation_checkpointing": True, "blocks": ["Linaer"]}, 'Linaer.*"Linear"'),
        ({"name": "fsdp", "hybrid": True}, "Use several machines"),
        ({"name": "fsdp", "cpu_offload": True}, "on CPUs"),
    ],
)
def test_invalid_settings_are_reported_before_training(strategy: dict[str, Any], message: str, tmp_path: Path) -> None:
    import re

    ranks = launch(make_job(epochs=1, strategy=strategy), tmp_path, 2)
    for rank in ranks:
        assert rank.error is not None
        assert rank.error[0] == "ConfigError"
        assert re.search(message, rank.error[1])
        assert not any(event.get("name") == "training" for event in rank.events)


# ---- beside the rest ------------------------------------------------------------------------------------------------


def test_an_average_of_sharded_weights_equals_that_of_whole_ones(tmp_path: Path) -> None:
    ema = {"ema": {"_target_": "launcher.engine.callbacks.Ema", "decay": 0.9}}
    for name in ("ddp", "fsdp"):
        succeed(job_of(name, callbacks=ema, evaluate_every=4), tmp_path / name, 2)
    one, other = (column(tmp_path / name, "val/loss") for name in ("ddp", "fsdp"))
    assert other == pytest.approx(one, abs=1e-5)


def test_an_average_of_weights_that_differ_between_workers_is_refused(tmp_path: Path) -> None:
    ema = {"ema": {"_target_": "launcher.engine.callbacks.Ema"}}
    (rank, _) = launch(job_of("diloco", callbacks=ema), tmp_path, 2)
    assert rank.error is not None
    assert rank.error[0] == "ConfigError"
    assert re.search(r"callbacks\.ema .*strategy=diloco\b", rank.error[1])
