"""The host never waits for a GPU between two logs: steps run on PyTorch's meta device, which has no data.

The meta device replaces the GPU: it has shapes and dtypes but computes nothing, and the engine treats it as a device
that is not a CPU. Every read of a value (`.item()`, `if tensor:`, a copy to the host) would synchronize a GPU, and is
counted. On a GPU, benchmarks/gpu.py counts the synchronizations themselves.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from launcher.config import TrainerConfig
from launcher.engine.datasets import Data
from launcher.engine.metrics import Sums
from launcher.engine.optim import build_optimizer
from launcher.engine.runtime import PendingVote, Runtime, Vote
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.trainer import Trainer
from launcher.runs import RunDirectory
from launcher.startup_timing import Marks
from models.language import GPT
from tests.support.engine_ranks import make_job

GPU = torch.device("meta")  # replaces the GPU
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3}


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for the device, and returns a fixed number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        on_gpu = any(isinstance(one, torch.Tensor) and one.device == GPU for one in args)
        to_host = torch.device((kwargs or {}).get("device") or GPU).type == "cpu"
        if on_gpu and name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.seen[name] += 1
            return 1.0
        if on_gpu and name in ("_to_copy", "copy_") and to_host:
            self.seen["copy to the host"] += 1
            if name == "_to_copy":
                return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        return function(*args, **(kwargs or {}))


class OnGpu(Runtime):
    """One rank on a GPU. Its votes are on the host, where they can be read, unlike tensors of the meta device."""

    def vote(self, count: torch.Tensor | float, flags: dict[str, bool]) -> PendingVote:
        pending = super().vote(count, flags)
        assert pending.flags.device.type == "cpu"
        return Read(pending.names, pending.count, pending.flags)


class Read(PendingVote):
    def wait(self) -> Vote:
        assert self.count is not None
        return Vote(self.count, dict.fromkeys(self.names, 0))


class Watched(GPT):
    """Reads its loss in each step, as users' networks do. It must be counted."""

    def training_step(self, batch: Any) -> Any:
        answer = super().training_step(batch)
        answer["loss"][0].item()
        return answer


def waits_of(steps: int, kind: type[nn.Module] = GPT, microbatches: int = 1, **trainer: Any) -> Counter[str]:
    settings = TrainerConfig(global_batch_size=4, **trainer)
    with Waits() as waits:
        with GPU:
            model = kind(vocabulary=64, context=16, width=16, layers=2, heads=2)
        runtime = OnGpu(0, 1, 0, 1, GPU)
        strategy = DataParallel(model, runtime, settings)
        optimizer = build_optimizer(ADAMW, model)
        sums = Sums(GPU)
        rows = torch.zeros(4 // microbatches, 16, dtype=torch.long, device=GPU)
        waits.seen.clear()  # construction may wait
        for _ in range(steps):
            vote = strategy.accumulate([(rows, rows)] * microbatches, 4, {"stop": False}, sums.add)
            strategy.apply(optimizer, 4, vote)
        return waits.seen


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_steps_do_not_wait_for_the_gpu(clip_norm: float | None, microbatches: int) -> None:
    assert not waits_of(3, microbatches=microbatches, clip_norm=clip_norm)


def test_a_network_that_reads_its_loss_is_counted() -> None:
    assert waits_of(3, Watched) == {"_local_scalar_dense": 3}


# ---- the whole loop -------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Raised when enough steps are done."""


class Asked:
    """A control that resets the count before the first step, and ends the run at the start of a step."""

    def __init__(self, waits: Waits, steps: int) -> None:
        self._waits, self._left = waits, steps

    def requests(self) -> frozenset[str]:
        if not self._left:
            raise Enough
        self._left -= 1
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        if event == {"kind": "phase", "name": "training"}:
            self._waits.seen.clear()


def waits_of_a_run(folder: Path, steps: int, **trainer: Any) -> Counter[str]:
    """Train like every run: loader, vote, sums, first bad loss, schedule, callbacks, records."""
    job = make_job(
        global_batch_size=4,
        steps=100,
        scheduler={"_target_": "launcher.engine.optim.WarmupCosine", "warmup_steps": 5},
        evaluate_every=1000,
        checkpoint={"every": 1000},
        **trainer,
    )
    directory = RunDirectory(folder)
    directory.create()
    with Waits() as waits:
        with GPU:
            model = GPT(vocabulary=64, context=16, width=16, layers=2, heads=2)
        rows = torch.zeros(40, 16, dtype=torch.long, device=GPU)
        data = Data(TensorDataset(rows, rows), {}, {}, None, 0)
        control = Asked(waits, steps)
        run = Trainer(job, OnGpu(0, 1, 0, 1, GPU), control, directory, data, model, 0.0, Marks([("first_step", 0.0)]))
        with pytest.raises(Enough):
            run.fit()
        assert run.progress.step == steps
        return waits.seen


@pytest.mark.parametrize("trainer", [{}, {"clip_norm": 1.0, "microbatch_size": 2}])
def test_a_run_does_not_wait_between_two_logs(trainer: dict[str, Any], tmp_path: Path) -> None:
    assert not waits_of_a_run(tmp_path, 5, log_every=50, **trainer)


def test_a_log_waits_and_is_counted(tmp_path: Path) -> None:
    assert waits_of_a_run(tmp_path, 5, log_every=2)["copy to the host"] == 2
