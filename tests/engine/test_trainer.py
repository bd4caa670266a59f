"""The training loop: intervals, precision, errors and records."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.checkpoint import available, load_weights, newest_intact
from tests.support import engine_toys as toys
from tests.support.engine_ranks import (
    Rank,
    Script,
    assert_same_run,
    assert_same_weights,
    column,
    final_weights,
    launch,
    logged,
    make_job,
    result_of,
    succeed,
)

EXPLOSIVE = {"_target_": "Explosive", "kind": "nan"}


def only(ranks: list[Rank], name: str) -> tuple[str, str, str]:
    """Return the error of this class; other ranks only report the loss of this rank."""
    errors = [rank.error for rank in ranks if rank.error is not None and rank.error[0] == name]
    assert errors, [rank.error for rank in ranks]
    assert {rank.error and rank.error[0] for rank in ranks} <= {name, "WorkerLost"}
    return errors[0]


# ---- numbers that are none ------------------------------------------------------------------------------------------


def meeting(sample: int, workers: int, chunk: int | None = None) -> tuple[int, int]:
    """Return the step and the rank that train with a sample, with batches of 100 of 1,037 samples and seed 0."""
    from launcher.engine.order import Order, Split

    order = Order(1037, 100, 0)
    at = order.epoch(0).tolist().index(sample)
    batch, position = divmod(at, 100)
    shares = [Split(chunk=chunk).share(order.batch_size(batch), rank, workers) for rank in range(workers)]
    (rank,) = [r for r, spans in enumerate(shares) if any(start <= position < stop for start, stop in spans)]
    return batch + 1, rank


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_non_finite_loss_is_reported_with_step_and_rank(kind: str, workers: int, tmp_path: Path) -> None:
    job = make_job(model={**EXPLOSIVE, "kind": kind}, epochs=2, log_every=50, checkpoint={"every": 1, "keep": 100})
    ranks = launch(job, tmp_path, workers)
    step, culprit = meeting(900, workers)
    assert 2 < step < 11
    for rank in ranks:  # all ranks report it, and no rank waits for another
        assert rank.error is not None
        assert rank.error[0] == "NonFiniteLoss"
        assert re.search(
            rf" {step} on rank {culprit}; .*{tmp_path}/checkpoints/step-{step - 1:08d}\b", rank.error[1], re.IGNORECASE
        )
    newest = newest_intact(tmp_path / "checkpoints").path
    assert newest is not None
    assert newest.name == f"step-{step - 1:08d}"
    assert all(value.isfinite().all() for value in load_weights(newest).values())


GRADIENTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "clipped": {"clip_norm": 1.0},
    "exact": {"deterministic": True},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "local_sgd": {"strategy": {"name": "local_sgd"}},
    "powersgd": {"strategy": {"compression": "powersgd"}},
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", GRADIENTS)
def test_a_non_finite_gradient_is_reported_with_step_and_rank(how: str, workers: int, tmp_path: Path) -> None:
    # The loss is finite: the checkpoint of that step must not become the newest.
    checkpoint = {"every": 1, "keep": 100}
    job = make_job(model={**EXPLOSIVE, "kind": "gradient"}, epochs=2, checkpoint=checkpoint, **GRADIENTS[how])
    ranks = launch(job, tmp_path, workers)
    step, culprit = meeting(900, workers, chunk=13 if how == "exact" else None)  # an eighth of the global batch
    for rank in ranks:
        assert rank.error is not None
        assert rank.error[0] == "NonFiniteLoss"
        # FSDP shards the sum, so all ranks are bad.
        assert re.search(rf"\S+\.(weight|bias) .*\bNaN\b.* {step} on \w+ \d", rank.error[1])
        if how != "fsdp":
            assert re.search(rf" {step} on \w+ {culprit}, ", rank.error[1])
        assert f"step-{step - 1:08d}" in rank.error[1]
        assert "clip_norm" not in rank.error[1]
    assert max(available(tmp_path / "checkpoints")) == step - 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_non_finite_first_gradient_is_reported_at_the_first_step(workers: int, tmp_path: Path) -> None:
    ranks = launch(make_job(model={**EXPLOSIVE, "kind": "gradient", "sample": None}), tmp_path, workers)
    everyone = ", ".join(rf"\w+ 1 on \w+ {rank}" for rank in range(workers))
    for rank in ranks:
        assert rank.error is not None
        assert rank.error[0] == "NonFiniteLoss"
        assert re.search(rf"\bNaN\b.* {everyone}, ", rank.error[1])
        assert "step-" not in rank.error[1], "there is no checkpoint yet"


# ---- errors of the user's code --------------------------------------------------------------------------------------


def test_an_exception_of_the_model_is_reported_with_the_users_frames(tmp_path: Path) -> None:
    ranks = launch(make_job(model={**EXPLOSIVE, "kind": "raise"}), tmp_path, 2, timeout=240)
    _, message, traceback = only(ranks, "UserCodeError")
    assert message.startswith("KeyError: 'no such thing among")
    files = re.findall(r'File "([^"]+)", line \d+, in (\w+)', traceback)
    assert [name for _, name in files] == ["training_step", "helper"]
    assert all(file.endswith("engine_toys.py") for file, _ in files)
    assert "UserCodeError: KeyError" in (tmp_path / "log.txt").read_text()


def test_a_killed_rank_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    ranks = launch(make_job(model={**EXPLOSIVE, "kind": "exit"}), tmp_path, 3, timeout=240)
    assert sorted(str(rank.error and rank.error[0]) for rank in ranks) == ["None", "WorkerLost", "WorkerLost"]
    assert all("run.resume=true" in rank.error[1] for rank in ranks if rank.error)


def test_a_parameter_that_a_later_batch_does_not_use_is_reported(tmp_path: Path) -> None:
    model = {"_target_": "Branches", "residue": 30, "never": False}
    ranks = launch(make_job(model=model), tmp_path, 2, timeout=240)
    _, message, _ = only(ranks, "UserCodeError")
    assert re.search(r"^training_step .*parameter\.sum\(\).*trainer\.deterministic=true", message)


def test_prints_are_kept_with_their_rank_and_shown(tmp_path: Path) -> None:
    ranks = succeed(make_job(model="Loud", steps=2), tmp_path, 2)
    for number, rank in enumerate(ranks):
        lines = [event["text"] for event in rank.events if event["kind"] == "line"]
        assert lines[0] == "built"
        assert lines[-2:] == ["a step of 50", "a step of 50"]
        assert (tmp_path / "log.txt").read_text().count(f"[rank {number}] a step of 50") >= 2


def test_a_full_disk_is_reported_and_saved_checkpoints_remain(tmp_path: Path) -> None:
    job = make_job(deterministic=True, epochs=1, log_every=5, checkpoint={"every": 1})
    full = tmp_path / "full"
    disk = {"_target_": f"{toys.__name__}.FullDisk", "file": "metrics.jsonl"}
    ranks = launch(replace(job, callbacks={"disk": disk}), full, 2)
    _, message, _ = only(ranks, "TrainingError")
    assert ": No space left on device" in message
    assert "run.resume=true" in message
    succeed(job, full, 2)
    succeed(job, tmp_path / "whole")
    assert_same_weights(final_weights(full), final_weights(tmp_path / "whole"))


def test_a_print_on_a_full_disk_is_not_an_error(tmp_path: Path) -> None:
    disk = {"_target_": "FullDisk", "file": "log.txt"}
    succeed(make_job(model="Loud", steps=2, callbacks={"disk": disk}), tmp_path)
    written = (tmp_path / "log.txt").read_text()
    assert "built" in written
    assert "completed after" not in written


# ---- precision and the cutting of batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_similarly(precision: str, workers: int, tmp_path: Path) -> None:
    succeed(make_job(epochs=2), tmp_path / "float32")
    ranks = succeed(make_job(epochs=2, precision=precision), tmp_path / precision, workers)
    full, low = (column(tmp_path / name, "train/loss") for name in ("float32", precision))
    assert low != full
    # The first float16 steps may be skipped until the loss scale fits.
    assert low[-1] == pytest.approx(full[-1], abs=0.05)
    assert all(value.dtype == torch.float32 for value in final_weights(tmp_path / precision).values())
    printed = [event["text"] for rank in ranks for event in rank.events if event["kind"] == "line"]
    assert not printed, "PyTorch's warnings would puzzle the user"


@pytest.mark.parametrize("workers", [1, 2])
def test_microbatches_give_the_gradient_of_the_whole_batch(workers: int, tmp_path: Path) -> None:
    for micro in (None, 7):
        job = make_job(model="Tokens", steps=20, microbatch_size=micro, clip_norm=0.3)
        succeed(job, tmp_path / str(micro), workers)
    whole, parts = (column(tmp_path / str(micro), "train/loss") for micro in (None, 7))
    assert parts == pytest.approx(whole, abs=1e-5)
    norms = [column(tmp_path / str(micro), "train/grad_norm") for micro in (None, 7)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_ranks_draw_other_random_numbers(tmp_path: Path) -> None:
    ranks = succeed(make_job(model="Noisy", steps=5), tmp_path, 2)
    one, other = ([value for what, value in rank.record if what == "random"][-5:] for rank in ranks)
    assert not set(one) & set(other)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_compiled_network_has_the_same_results(deterministic: bool, tmp_path: Path) -> None:
    model = {"_target_": "models.vision.ConvNet", "width": 4}
    how: dict[str, Any] = {"model": model, "data": "Pictures", "epochs": 2, "deterministic": deterministic}
    succeed(make_job(**how), tmp_path / "plain", 2)
    for workers in (2, 3) if deterministic else (2,):
        succeed(make_job(compile=True, **how), tmp_path / f"compiled{workers}", workers, timeout=300)
    plain, compiled = (column(tmp_path / name, "train/loss") for name in ("plain", "compiled2"))
    assert compiled == pytest.approx(plain, abs=1e-3)
    if deterministic:
        assert_same_run(tmp_path / "compiled2", tmp_path / "compiled3")
    assert not any("_orig_mod" in name for name in final_weights(tmp_path / "compiled2"))


@pytest.mark.slow
def test_compiled_kernels_are_reused_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache = tmp_path / ".cache" / "torchinductor"

    def compiled() -> set[Path]:
        return {path for path in cache.rglob("*.so") if path.is_file()}

    job = make_job(model={"_target_": "models.vision.ConvNet", "width": 4}, data="Pictures", steps=2, compile=True)
    succeed(job, tmp_path / "first", timeout=300)
    before = compiled()
    assert before
    succeed(job, tmp_path / "second", timeout=300)
    assert compiled() == before


# ---- the trace of chosen steps --------------------------------------------------------------------------------------


def test_chosen_steps_are_traced_by_every_rank(tmp_path: Path) -> None:
    ranks = succeed(make_job(steps=6, logging={"profile": [3, 4]}), tmp_path, 2)
    assert "perfetto" in ranks[0].notes
    for rank in range(2):
        with gzip.open(tmp_path / "profile" / f"rank{rank}.pt.trace.json.gz", "rt") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        assert [name for name in names if name.startswith("ProfilerStep")] == ["ProfilerStep#3", "ProfilerStep#4"]
        assert any("allreduce" in name or "all_reduce" in name for name in names)
        assert any("Optimizer.step" in name for name in names)


def test_a_run_that_ends_within_the_trace_still_writes_it(tmp_path: Path) -> None:
    succeed(make_job(steps=20, logging={"profile": [2, 9]}), tmp_path, scripts=Script(stop_after=4))
    assert (tmp_path / "profile" / "rank0.pt.trace.json.gz").exists()


# ---- notes at the start --------------------------------------------------------------------------------------


def test_layers_that_depend_on_the_split_are_named_once(tmp_path: Path) -> None:
    ranks = succeed(make_job(model="Normed", steps=2), tmp_path, 2)
    for layer in ("BatchNorm1d", "Dropout"):
        assert ranks[0].notes.count(f" {layer}: ") == 1
    assert ranks[1].notes == ""
    assert succeed(make_job(steps=2), tmp_path / "plain")[0].notes == ""


def test_trying_the_first_batch_leaves_no_trace_in_the_network(tmp_path: Path) -> None:
    for name, logging in (("drawn", {"tensorboard": True, "graph": True}), ("not", {})):
        succeed(make_job(model="Normed", steps=2, logging=logging), tmp_path / name)
    weights = final_weights(tmp_path / "drawn")
    assert weights["stem.1.num_batches_tracked"] == 2
    assert_same_weights(weights, final_weights(tmp_path / "not"))


# ---- when what is due -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "losses", "validations"),
    [
        ({"log_every": 4, "evaluate_every": 6}, [4, 8, 12, 16, 20, 22], [6, 12, 18, 22]),
        ({"log_every": "1ep", "evaluate_every": "2ep"}, [11, 22], [22]),
        ({"log_every": 100, "evaluate_every": "1ep"}, [22], [11, 22]),
        ({"log_every": "1h", "evaluate_every": "1h"}, [22], [22]),
        ({"log_every": "0.000001s", "evaluate_every": "5ep"}, list(range(1, 23)), [22]),
    ],
    ids=["steps", "epochs", "seldom", "hours", "microseconds"],
)
def test_logs_and_validations_occur_at_their_intervals(
    how: dict[str, Any], losses: list[int], validations: list[int], tmp_path: Path
) -> None:
    succeed(make_job(epochs=2, **how), tmp_path, 2)
    entries = logged(tmp_path)
    assert [step for step, values in entries.items() if "train/loss" in values] == losses
    assert [step for step, values in entries.items() if "val/loss" in values] == validations
    assert [values["samples"] for values in entries.values()][-1] == 2 * 1037
    assert [values["epoch"] for values in entries.values()][-1] == 2.0


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"every": 4, "keep": 2, "monitor": None}, [20, 22]),
        ({"every": 4, "keep": 3, "monitor": None}, [16, 20, 22]),
        ({"every": "1ep", "keep": 5, "monitor": None}, [11, 22]),
        ({"every": "1h", "keep": 5, "monitor": None}, [22]),
        # The checkpoint with the highest accuracy is kept, and the newest.
        ({"every": 4, "keep": 1, "monitor": "val/accuracy", "mode": "max"}, "best"),
        ({"every": 4, "keep": 1, "monitor": "val/loss", "mode": "max"}, "best"),
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(checkpoint: dict[str, Any], kept: Any, tmp_path: Path) -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 1.5, "momentum": 0.9}  # up and down
    succeed(make_job(epochs=2, evaluate_every=1, optimizer=sgd, checkpoint=checkpoint), tmp_path, 2)
    found = sorted(available(tmp_path / "checkpoints"))
    best = result_of(tmp_path)["best"]
    if kept != "best":
        assert found == kept
        assert best is None
        return
    values = {step: values[checkpoint["monitor"]] for step, values in logged(tmp_path).items()}
    top = max(values.values())
    first = min(step for step, value in values.items() if value == top)
    assert best == {"tag": checkpoint["monitor"], "value": top, "step": first}
    assert found == sorted({first, 22})


def test_overfitting_repeats_the_first_batches(tmp_path: Path) -> None:
    job = make_job(model={"_target_": "Net", "note": True}, overfit_batches=2, epochs=3, global_batch_size=10)
    (rank,) = succeed(job, tmp_path)
    numbers = [content[0] for what, *content in rank.record if what == "losses"][-6:]
    assert numbers == 3 * [list(range(10)), list(range(10, 20))]
    assert rank.result["steps"] == 6


def test_result_json_describes_the_run(tmp_path: Path) -> None:
    ranks = succeed(make_job(epochs=2, log_every=5), tmp_path, 2)
    result = result_of(tmp_path)
    assert ranks[0].result == result
    assert ranks[1].result == {}
    entries = logged(tmp_path)
    assert result["metrics"]["train/loss"] == entries[22]["train/loss"]
    assert result["metrics"]["val/accuracy"] == entries[22]["val/accuracy"]
    assert result["metrics"]["cluster/workers"] == 2
    expected = {"status": "completed", "steps": 22, "epochs": 2.0, "samples": 2074, "workers": 2, "world_sizes": [2]}
    assert {key: result[key] for key in expected} == expected
    assert result["best"]["value"] == min(values["val/loss"] for values in entries.values() if "val/loss" in values)
    assert result["samples_per_second"] > 0


# ---- beginning with weights -----------------------------------------------------------------------------------------


def weights_file(tmp_path: Path) -> str:
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save(toys.Net().state_dict(), path)
    return str(path)


def test_training_starts_with_the_given_weights(tmp_path: Path) -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.0}
    file = weights_file(tmp_path)
    for workers in (1, 2):
        ranks = succeed(make_job(steps=1, optimizer=sgd), tmp_path / str(workers), workers, weights=file)
        for rank in ranks:
            assert_same_weights(rank.weights, torch.load(file))
    # A resume ignores checkpoint.load.
    succeed(make_job(steps=2, optimizer={**sgd, "lr": 0.5}), tmp_path / "1")
    before = final_weights(tmp_path / "1")
    succeed(make_job(steps=2), tmp_path / "1", weights=file)
    assert_same_weights(final_weights(tmp_path / "1"), before)


def test_weights_that_do_not_fit_are_reported_or_skipped(tmp_path: Path) -> None:
    file = weights_file(tmp_path)
    (rank,) = launch(make_job(model="Other", steps=1), tmp_path / "strict", weights=file)
    assert rank.error is not None
    assert rank.error[0] == "CheckpointError"
    assert re.search(
        r": extra\.bias, extra\.weight, tail\.bias, tail\.weight; .*: head\.bias, head\.weight\b", rank.error[1]
    )
    assert "checkpoint.load_strict=false" in rank.error[1]
    lenient = make_job(model="Other", steps=1, checkpoint={"load_strict": False})
    (rank,) = succeed(lenient, tmp_path / "lenient", weights=file)
    assert re.search(r"\b4 \w+, 2 \w+", rank.notes)
    (rank,) = launch(
        make_job(model={"_target_": "Net", "width": 8}, steps=1, checkpoint={"load_strict": False}),
        tmp_path / "shape",
        weights=file,
    )
    assert rank.error is not None
    assert re.search(r"head\.weight \(4, 16\) .*\(4, 8\)", rank.error[1])


# ---- the engine stands alone ----------------------------------------------------------------------------------------

_WITHOUT = """
import sys, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "hydra", "omegaconf"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
from pathlib import Path
from launcher.engine.entry import Task, run
from launcher.engine.runtime import Runtime
from launcher.runs import RunDirectory
from launcher.config.schema import CheckpointConfig, Job, LoggingConfig, TrainerConfig

class Silent:
    def requests(self): return frozenset()
    def emit(self, event): pass

directory = RunDirectory(Path(sys.argv[1]))
directory.create()
job = Job(
    model={"_target_": "tests.support.engine_toys.Net"},
    data={"_target_": "tests.support.engine_toys.Points"},
    optimizer={"_target_": "torch.optim.AdamW", "lr": 0.01},
    trainer=TrainerConfig(steps=3, global_batch_size=100, log_every=1),
    trust=["tests.support.engine_toys"],
)
result = run(Task("train", job, sys.argv[1], [], time.time()), Runtime.single("cpu"), Silent())
print(result["status"], [name for name in ("ray", "hydra", "omegaconf") if name in sys.modules])
"""


def test_the_engine_trains_without_ray_and_hydra(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip() == "completed []", done.stderr
