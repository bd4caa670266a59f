"""`strategy=auto`: all ranks use the same strategy, selected by memory and prediction and stored in the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from launcher.config.checks import check_values
from launcher.engine import hardware
from launcher.engine.auto_strategy import Candidate, choose, resolve_strategy
from launcher.engine.runtime import Runtime
from launcher.errors import ConfigError
from launcher.runs import RunDirectory
from tests.support.engine_ranks import Script, column, make_job, on_ranks, result_of, succeed
from tests.support.engine_toys import FEATURES, Tokens

AUTO = {"name": "auto"}
DROPPED = {"_target_": "Net", "dropout": 0.5}


@pytest.mark.parametrize(
    ("ddp", "fsdp", "room", "chosen"),
    [
        ((80, 1.0), (40, 1.5), 100, "ddp"),  # both fit
        ((80, 1.5), (40, 1.0), 100, "fsdp"),
        ((80, 1.0), (40, 1.0), 100, "ddp"),  # equally fast
        ((120, 1.0), (60, 1.5), 100, "fsdp"),  # one fits
        ((101, None), (60, None), 100, "fsdp"),  # nothing was timed
        ((300, 1.0), (150, 1.5), 100, "fsdp"),  # none fits: the one that needs the least
    ],
)
def test_the_fastest_strategy_that_fits_into_memory_is_selected(ddp: Any, fsdp: Any, room: float, chosen: str) -> None:
    assert choose([Candidate("ddp", *ddp), Candidate("fsdp", *fsdp)], room).name == chosen


class _Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def requests(self) -> frozenset[str]:
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        self.texts.append(event["text"])


def resolved(runtime: Runtime, room: float, folder: str) -> tuple[str, list[str], bool]:
    """Resolve `auto` for a small network; rank 0 has `room` bytes of memory, rank 1 twice as many.

    Returns the strategy, the notes, and whether the model and the random state are unchanged.
    """
    torch.manual_seed(runtime.rank)
    model, notes = Tokens(width=40), _Notes()
    before, random = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    batch = (torch.zeros(20, FEATURES), torch.zeros(20, dtype=torch.int64), torch.arange(20))
    with patch.object(hardware, "memory_of_a_worker", lambda *_: room * (1 + runtime.rank)):
        job, _ = resolve_strategy(
            make_job(strategy=AUTO),
            model,
            lambda: model.training_step(batch),
            1,
            runtime,
            RunDirectory(Path(folder)),
            notes,
        )
    same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    unchanged = same and torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    return job.strategy.name, notes.texts, unchanged


@pytest.mark.parametrize(
    ("bytes_", "chosen", "note"),
    [
        (
            2**30,
            "ddp",
            r" ddp: .* 1\.0 GiB; .* s .*\bddp, .* s .*\bfsdp\b",
        ),
        (20, "fsdp", r" fsdp: .* 20 B; "),
    ],
)
def test_all_ranks_use_the_selection_of_rank_0_and_the_run_stores_it(
    bytes_: int, chosen: str, note: str, tmp_path: Path
) -> None:
    for expected in (note, rf" {chosen}: \D*$"):
        ranks = on_ranks(resolved, 2, bytes_, str(tmp_path))
        assert [name for name, _, _ in ranks] == [chosen, chosen]
        assert [len(texts) for _, texts, _ in ranks] == [1, 0]
        assert re.search(expected, ranks[0][1][0])
        assert all(unchanged for _, _, unchanged in ranks)
        bytes_ = 2**30  # more memory does not change a stored selection


def test_a_run_equals_one_with_the_selected_strategy_and_a_resume_keeps_it(tmp_path: Path) -> None:
    """Guards against a measurement that changes the random state, and a resume that selects again."""
    succeed(make_job(model=DROPPED, steps=8), tmp_path / "ddp", 2)
    (first, _) = succeed(
        make_job(model=DROPPED, steps=8, strategy=AUTO), tmp_path / "auto", 2, scripts=Script(stop_after=4)
    )
    assert re.search(r"strategy=auto .*\bddp: .*\bddp\b.*\bfsdp\b", first.notes)
    assert result_of(tmp_path / "auto")["strategy"] == "ddp"
    (again, _) = succeed(make_job(model=DROPPED, steps=8, strategy=AUTO), tmp_path / "auto", 2)
    assert re.search(r"strategy=auto .*\bddp: [^\d\n]*$", again.notes, re.MULTILINE), "measured again"
    assert column(tmp_path / "auto", "train/loss") == column(tmp_path / "ddp", "train/loss")

    RunDirectory(tmp_path / "sharded").path.mkdir()
    RunDirectory(tmp_path / "sharded").update_result(strategy="fsdp")
    succeed(make_job(model="Tokens", steps=8), tmp_path / "whole", 2)
    succeed(make_job(model="Tokens", steps=8, strategy=AUTO), tmp_path / "sharded", 2)
    assert column(tmp_path / "sharded", "train/loss") == pytest.approx(
        column(tmp_path / "whole", "train/loss"), abs=1e-5
    )


@pytest.mark.parametrize(("workers", "more"), [(1, {}), (2, {"deterministic": True})])
def test_ddp_is_selected_without_a_choice(workers: int, more: dict[str, Any], tmp_path: Path) -> None:
    (first, *_) = succeed(make_job(steps=2, strategy=AUTO, **more), tmp_path, workers)
    assert re.search(r"strategy=auto .*\bddp: ", first.notes)


@pytest.mark.parametrize("more", [{"compression": "bf16"}, {"inner_steps": 4}, {"hybrid": True}])
def test_options_that_are_not_exact_or_belong_to_one_strategy_are_rejected(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="auto"):
        check_values(make_job(strategy={**AUTO, **more}))
