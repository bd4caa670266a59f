"""`strategy=auto`: one decision for all ranks, by memory and by prediction, which a run keeps."""

from __future__ import annotations

import re
from contextlib import nullcontext
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
        ((80, 1.0), (40, 1.5), 100, "ddp"),  # both are held
        ((80, 1.5), (40, 1.0), 100, "fsdp"),
        ((80, 1.0), (40, 1.0), 100, "ddp"),  # neither is quicker
        ((120, 1.0), (60, 1.5), 100, "fsdp"),  # one is held
        ((101, None), (60, None), 100, "fsdp"),  # nothing was timed
        ((300, 1.0), (150, 1.5), 100, "fsdp"),  # none is held: the one that needs the least
    ],
)
def test_the_quickest_that_memory_holds(ddp: Any, fsdp: Any, room: float, chosen: str) -> None:
    assert choose([Candidate("ddp", *ddp), Candidate("fsdp", *fsdp)], room).name == chosen


class _Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def requests(self) -> frozenset[str]:
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        self.texts.append(event["text"])


def settled(runtime: Runtime, room: float, folder: str) -> tuple[str, list[str], bool]:
    """Settle a small network where rank 0 has `room` bytes, rank 1 twice as many; last: whether nothing was changed."""
    torch.manual_seed(runtime.rank)
    model, notes = Tokens(width=40), _Notes()
    before, random = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    batch = (torch.zeros(20, FEATURES), torch.zeros(20, dtype=torch.int64), torch.arange(20))
    with patch.object(hardware, "memory_of_a_worker", lambda *_: room * (1 + runtime.rank)):
        job, _ = resolve_strategy(
            make_job(strategy=AUTO), model, batch, 1, runtime, RunDirectory(Path(folder)), notes, nullcontext
        )
    same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    unchanged = same and torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    return job.strategy.name, notes.texts, unchanged


@pytest.mark.parametrize(
    ("bytes_", "chosen", "told"),
    [
        (2**30, "ddp", "takes ddp: a worker needs .* and has 1.0 GiB; predicted are .* with ddp, .* with fsdp a step"),
        (20, "fsdp", "takes fsdp: .* has 20 B; nothing was timed"),
    ],
)
def test_all_ranks_take_what_rank_0_decides_and_the_run_keeps_it(
    bytes_: int, chosen: str, told: str, tmp_path: Path
) -> None:
    for turn in (told, f"takes {chosen}: as this run began"):
        ranks = on_ranks(settled, 2, bytes_, str(tmp_path))
        assert [name for name, _, _ in ranks] == [chosen, chosen]
        assert [len(texts) for _, texts, _ in ranks] == [1, 0]
        assert re.search(turn, ranks[0][1][0])
        assert all(unchanged for _, _, unchanged in ranks)
        bytes_ = 2**30  # what has changed since changes nothing


def test_a_run_is_that_of_what_it_takes_and_a_resume_takes_the_same(tmp_path: Path) -> None:
    """Would be wrong: measuring that moves the random numbers, or a resume that decides anew."""
    succeed(make_job(model=DROPPED, steps=8), tmp_path / "ddp", 2)
    (first, _) = succeed(
        make_job(model=DROPPED, steps=8, strategy=AUTO), tmp_path / "auto", 2, scripts=Script(stop_after=4)
    )
    assert "strategy=auto takes ddp: a worker needs" in first.notes
    assert result_of(tmp_path / "auto")["strategy"] == "ddp"
    (again, _) = succeed(make_job(model=DROPPED, steps=8, strategy=AUTO), tmp_path / "auto", 2)
    assert "strategy=auto takes ddp: as this run began" in again.notes
    assert column(tmp_path / "auto", "train/loss") == column(tmp_path / "ddp", "train/loss")

    RunDirectory(tmp_path / "sharded").path.mkdir()
    RunDirectory(tmp_path / "sharded").update_result(strategy="fsdp")
    succeed(make_job(model="Tokens", steps=8), tmp_path / "whole", 2)
    succeed(make_job(model="Tokens", steps=8, strategy=AUTO), tmp_path / "sharded", 2)
    assert column(tmp_path / "sharded", "train/loss") == pytest.approx(
        column(tmp_path / "whole", "train/loss"), abs=1e-5
    )


@pytest.mark.parametrize(("workers", "more"), [(1, {}), (2, {"deterministic": True})])
def test_where_there_is_nothing_to_choose_it_is_ddp(workers: int, more: dict[str, Any], tmp_path: Path) -> None:
    (first, *_) = succeed(make_job(steps=2, strategy=AUTO, **more), tmp_path, workers)
    assert "strategy=auto takes ddp" in first.notes


@pytest.mark.parametrize("more", [{"compression": "bf16"}, {"inner_steps": 4}, {"hybrid": True}])
def test_what_is_not_exact_or_belongs_to_one_strategy_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="auto"):
        check_values(make_job(strategy={**AUTO, **more}))
