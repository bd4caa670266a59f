"""A run that was killed, stopped or damaged and resumed is bit-identical to an uninterrupted run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Job
from launcher.engine.checkpoint import available
from launcher.engine.record import StepFile
from tests.support.engine_ranks import (
    Script,
    assert_same_log,
    assert_same_run,
    board,
    column,
    final_weights,
    kill,
    launch,
    logged,
    make_job,
    result_of,
    succeed,
)

# 11 steps an epoch. Logs after steps 4, 8, …; checkpoints after steps 3, 6, …, and where validation improved (11, 22).
EVERYTHING: dict[str, Any] = {
    "epochs": 2,
    "log_every": 4,
    "clip_norm": 0.5,
    "checkpoint": {"every": 3, "keep": 2},
    "logging": {"tensorboard": True},
    "scheduler": {"_target_": "launcher.engine.optim.WarmupCosine", "warmup_steps": 5},
}


Whole = Callable[[Job, int], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return the directory of an uninterrupted run; each is run once per session."""
    known: dict[str, Path] = {}

    def run(job: Job, workers: int) -> Path:
        key = f"{workers} {job}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole")
            succeed(job, known[key], workers)
        return known[key]

    return run


def steps_done(directory: Path) -> int:
    file = StepFile(directory)
    done = file.read()
    file.close()
    return done


def assert_one_value_a_step(directory: Path, never_stopped: Path) -> None:
    """As TensorBoard reads the file: the same values, each once."""
    found, expected = board(directory), board(never_stopped)
    assert found == expected
    for tag, values in found.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
    assert [step for step, _ in found["train/loss"]] == [4, 8, 12, 16, 20, 22]


def killed_twice(job: Job, directory: Path, workers: Sequence[int]) -> None:
    """Kill the run between two logs, twice within the first epoch, then let it complete."""
    first, second, last = workers
    kill(job, directory, first, after=5, once_saved=3)
    kill(job, directory, second, after=10, once_saved=9)
    succeed(job, directory, last)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_a_run_killed_twice_equals_an_uninterrupted_run(
    workers: int, deterministic: bool, whole: Whole, tmp_path: Path
) -> None:
    job = make_job(model="Tokens", deterministic=deterministic, **EVERYTHING)
    expected = whole(job, 1 if deterministic else workers)
    killed_twice(job, tmp_path, [workers] * 3)
    assert_same_run(expected, tmp_path)
    assert_one_value_a_step(tmp_path, expected)
    result, other = result_of(tmp_path), result_of(expected)
    assert (result["restarts"], result["lost_steps"], result["world_sizes"]) == (2, (5 - 3) + (10 - 9), [workers])
    same = ("status", "steps", "epochs", "samples", "best")
    assert {key: result[key] for key in same} == {key: other[key] for key in same}
    assert (result["steps"], result["epochs"], result["samples"]) == (22, 2.0, 2074)
    assert Path(result["checkpoint"]).name == "step-00000022"


def test_a_deterministic_run_with_other_numbers_of_workers_is_exact(whole: Whole, tmp_path: Path) -> None:
    job = make_job(model="Tokens", deterministic=True, **EVERYTHING)
    killed_twice(job, tmp_path, [2, 3, 1])
    assert_same_run(whole(job, 1), tmp_path)
    assert_one_value_a_step(tmp_path, whole(job, 1))
    assert result_of(tmp_path)["world_sizes"] == [2, 3, 1]


def test_random_layers_and_augmentation_resume_exactly(tmp_path: Path) -> None:
    # A resume starts new loader processes, which must not use the random numbers of the network.
    job = make_job(
        model={"_target_": "Net", "dropout": 0.5},
        data={"_target_": "Augmented", "num_workers": 1},
        **{**EVERYTHING, "logging": {}},
    )
    succeed(job, tmp_path / "whole", 2)
    kill(job, tmp_path / "killed", 2, after=5, once_saved=3)
    succeed(job, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_convolutions_resume_exactly(deterministic: bool, tmp_path: Path) -> None:
    # Their weights have another memory layout, which the optimizer's state must have too.
    job = make_job(
        model={"_target_": "models.vision.ConvNet", "width": 4},
        data={"_target_": "Pictures", "train": 500},
        deterministic=deterministic,
        **{**EVERYTHING, "logging": {}},
    )
    succeed(job, tmp_path / "whole", 2)
    kill(job, tmp_path / "killed", 2, after=5, once_saved=3)
    succeed(job, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_low_precision_resumes_exactly(precision: str, tmp_path: Path) -> None:
    # The loss scale, which was halved until it fitted, is part of the state.
    job = make_job(model="Steep", precision=precision, **{**EVERYTHING, "logging": {}})
    ranks = succeed(job, tmp_path / "whole", 2)
    printed = [event["text"] for rank in ranks for event in rank.events if event["kind"] == "line"]
    assert not printed, "PyTorch's warnings would confuse the user"
    kill(job, tmp_path / "killed", 2, after=10, once_saved=9)
    succeed(job, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("moment", [4, 9, 13])
def test_killed_at_any_moment_of_a_save(moment: int, whole: Whole, tmp_path: Path) -> None:
    """Every step starts a save, so the kill hits one between its first byte and its rename."""
    job = make_job(deterministic=True, epochs=2, checkpoint={"every": 1})
    directory = tmp_path / "killed"
    launch(job, directory, 2, kill_when=lambda: directory.exists() and steps_done(directory) >= moment)
    ranks = succeed(job, directory, 2)
    assert "step-" not in ranks[0].notes  # an incomplete checkpoint has a temporary name
    assert_same_run(whole(job, 1), directory)
    assert not [path.name for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")]


# ---- counting -------------------------------------------------------------------------------------------------------


def test_restarts_without_a_checkpoint_between_them_are_all_counted(tmp_path: Path) -> None:
    job = make_job(model="Tokens", deterministic=True, **{**EVERYTHING, "checkpoint": {"every": 6}})
    kill(job, tmp_path, 2, after=10, once_saved=6)
    kill(job, tmp_path, 3, after=7)
    kill(job, tmp_path, 3, after=9)
    succeed(job, tmp_path, 2)
    result = result_of(tmp_path)
    assert result["restarts"] == 3
    assert result["lost_steps"] == (10 - 6) + (7 - 6) + (9 - 6)
    assert result["world_sizes"] == [2, 3, 2]


def test_a_run_killed_before_its_first_checkpoint_restarts_with_a_note(tmp_path: Path) -> None:
    job = make_job(model="Tokens", **{**EVERYTHING, "log_every": 2, "checkpoint": {"every": "1ep"}})
    whole = succeed(job, tmp_path / "whole", 2)
    assert whole[0].notes == ""
    kill(job, tmp_path / "killed", 2, after=7)
    ranks = succeed(job, tmp_path / "killed", 2)
    assert re.search(r" 0; 7 step\(s\) ", ranks[0].notes)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert board(tmp_path / "killed") == board(tmp_path / "whole")
    result = result_of(tmp_path / "killed")
    assert (result["restarts"], result["lost_steps"], result["world_sizes"]) == (1, 7, [2])


def test_seconds_and_samples_are_those_of_the_whole_life(tmp_path: Path) -> None:
    job = make_job(epochs=1)
    first = succeed(job, tmp_path, scripts=Script(stop_after=6))[0].result
    assert (first["status"], first["reason"], first["steps"], first["samples"]) == ("stopped", "signal", 6, 600)
    assert first["seconds"] > first["seconds_to_first_step"] > 0
    second = succeed(job, tmp_path)[0].result
    assert (second["status"], second["reason"], second["samples"]) == ("completed", None, 1037)
    assert second["seconds"] > first["seconds"] + second["seconds_to_first_step"]
    assert (second["restarts"], second["lost_steps"]) == (1, 0)


def test_a_run_that_is_complete_stays_as_it_is(tmp_path: Path) -> None:
    job = make_job(epochs=1)
    succeed(job, tmp_path, 2)
    weights, lines = final_weights(tmp_path), logged(tmp_path)
    result = succeed(job, tmp_path, 2)[0].result
    assert (result["status"], result["steps"]) == ("completed", 11)
    assert logged(tmp_path) == lines
    assert all((value == weights[name]).all() for name, value in final_weights(tmp_path).items())


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 2])
def test_a_stop_request_on_one_rank_stops_all_after_the_same_step(asked: int, whole: Whole, tmp_path: Path) -> None:
    job = make_job(model="Tokens", **EVERYTHING)
    ranks = succeed(job, tmp_path, 3, scripts={asked: Script(stop_after=5)})
    assert [sum(entry[0] == "step" for entry in rank.record) for rank in ranks] == [5, 5, 5]
    result = ranks[0].result
    assert (result["status"], result["reason"], result["steps"]) == ("stopped", "signal", 5)
    assert Path(result["checkpoint"]).name == "step-00000005"
    succeed(job, tmp_path, 3)
    assert_same_run(whole(job, 3), tmp_path)
    assert_one_value_a_step(tmp_path, whole(job, 3))
    assert result_of(tmp_path)["lost_steps"] == 0


def test_a_request_to_stop_after_the_last_step_changes_nothing(tmp_path: Path) -> None:
    result = succeed(make_job(epochs=1), tmp_path, 2, scripts={1: Script(stop_after=11)})[0].result
    assert (result["status"], result["steps"]) == ("completed", 11)


# ---- damage ---------------------------------------------------------------------------------------------------------


def cut_short(checkpoint: Path) -> None:
    data = checkpoint / "data-00000.bin"
    data.write_bytes(data.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    data = checkpoint / "data-00000.bin"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def lose_the_metadata(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_the_metadata])
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(
    damage: Callable[[Path], None], whole: Whole, tmp_path: Path
) -> None:
    job = make_job(model="Tokens", deterministic=True, **EVERYTHING)
    kill(job, tmp_path, 2, after=8, once_saved=6)
    damage(tmp_path / "checkpoints" / "step-00000006")
    ranks = succeed(job, tmp_path, 2)
    assert re.search(r" 3; 5 step\(s\) .* 1 .*step-00000006", ranks[0].notes)
    assert_same_run(whole(job, 1), tmp_path)
    assert_one_value_a_step(tmp_path, whole(job, 1))
    assert result_of(tmp_path)["lost_steps"] == 5


def test_a_run_without_intact_checkpoint_restarts_with_a_note(whole: Whole, tmp_path: Path) -> None:
    job = make_job(model="Tokens", deterministic=True, **EVERYTHING)
    kill(job, tmp_path, 2, after=8, once_saved=6)
    for path in available(tmp_path / "checkpoints").values():
        flip_a_bit(path)
    ranks = succeed(job, tmp_path, 2)
    assert re.search(r" 0; .* 2 .*step-00000003", ranks[0].notes)
    assert_same_run(whole(job, 1), tmp_path)
    assert_one_value_a_step(tmp_path, whole(job, 1))


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    job = make_job(epochs=1, checkpoint={"every": 2})
    succeed(job, tmp_path, scripts=Script(stop_after=4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    succeed(job, tmp_path)
    assert sorted(logged(tmp_path)) == list(range(1, 12))


# ---- what may change on resume -------------------------------------------------------------------------------------


def test_another_learning_rate_takes_effect(tmp_path: Path) -> None:
    groups = [{"match": "head.*", "lr": 0.001}]
    cosine = {"_target_": "launcher.engine.optim.WarmupCosine"}

    def job(lr: float) -> Job:
        optimizer = {"_target_": "torch.optim.AdamW", "lr": lr, "groups": groups}
        return make_job(epochs=1, optimizer=optimizer, scheduler=cosine)

    succeed(job(0.01), tmp_path / "one", scripts=Script(stop_after=4))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    succeed(job(0.01), tmp_path / "one")
    succeed(job(0.005), tmp_path / "other")
    one, other = (column(tmp_path / name, "train/learning_rate") for name in ("one", "other"))
    assert other[:4] == one[:4]
    assert other[4:] == pytest.approx([rate / 2 for rate in one[4:]])


def test_a_longer_run_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    job = make_job(epochs=1, deterministic=True)
    succeed(job, tmp_path / "longer", 2)
    longer = replace(job, trainer=replace(job.trainer, epochs=2))
    result = succeed(longer, tmp_path / "longer", 2)[0].result
    assert (result["status"], result["steps"], result["epochs"]) == ("completed", 22, 2.0)
    succeed(longer, tmp_path / "whole")
    assert_same_log(tmp_path / "whole", tmp_path / "longer")
