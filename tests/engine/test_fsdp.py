"""FSDP compared with DDP: the same loss, with about half of the state on each of two workers."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.config import Job, ScalingConfig, TrainerConfig
from launcher.config.schema import StrategyConfig
from launcher.engine.build import build_model, build_strategy
from launcher.engine.metrics import as_pair
from launcher.engine.optim import build_optimizer
from launcher.engine.runtime import Runtime
from tests.support.device import device
from tests.support.engine_ranks import on_ranks

pytestmark = pytest.mark.gpu

SMALL = {"width": 48, "layers": 3, "heads": 2, "context": 32, "vocabulary": 64}
LARGE = {
    "width": 640,
    "layers": 10,
    "heads": 10,
    "context": 64,
    "vocabulary": 256,
}  # conf/model/gpt_50m.yaml with another context


def nbytes(tensors: Any) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def trained(
    runtime: Runtime, strategy: dict[str, Any], size: dict[str, Any], steps: int, offload: bool = False
) -> dict[str, Any]:
    """Train a GPT on synthetic tokens; return its losses and the bytes of state on this worker.

    Args:
        offload: use CPU offload although the workers compute on CPUs, which the strategy would reject.
    """
    torch.set_num_threads(1)
    job = Job(
        model={"_target_": "models.language.GPT", **size},
        optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-3},
        strategy=StrategyConfig(**strategy),
        trainer=TrainerConfig(global_batch_size=4, clip_norm=1.0),
        scaling=ScalingConfig(device=device()),
    )
    model = build_model(job, runtime)
    parameters = sum(p.numel() for p in model.parameters())

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(size["vocabulary"], (4, 1), generator=generator)
        tokens = (starts + 3 * torch.arange(size["context"] + 1)) % size["vocabulary"]
        each = 4 // runtime.world_size
        share = tokens[runtime.rank * each : runtime.rank * each + each]
        return share[:, :-1], share[:, 1:]

    wrapped = build_strategy(job, model, runtime)
    if offload:
        wrapped._config = StrategyConfig(**strategy, cpu_offload=True)  # type: ignore[attr-defined]
    wrapped.prepare(batch(0))
    optimizer = build_optimizer(job.optimizer, model, may_fuse=wrapped.uses_all)
    wrapped.attach(optimizer, steps)
    losses: list[float] = []

    def record(answer: Any) -> None:
        total, count = as_pair("loss", answer["loss"])
        both = torch.tensor([float(total.detach()), float(count)], dtype=torch.float64)
        losses.append(float(runtime.add_up(both)[0] / both[1]))

    for step in range(steps):
        vote = wrapped.accumulate([batch(step)], 4, {"bad": False}, record)
        wrapped.apply(optimizer, 4, vote)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    weights = list(model.parameters())
    return {
        "losses": losses,
        "parameters": parameters,
        "state": nbytes(weights) + nbytes([p.grad for p in weights if p.grad is not None]) + nbytes(state),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@pytest.mark.parametrize(
    ("size", "strategy"),
    [
        (SMALL, {}),
        (SMALL, {"activation_checkpointing": True}),
        pytest.param(LARGE, {}, marks=pytest.mark.slow, id="50M"),
    ],
)
def test_the_same_loss_in_about_half_the_memory(size: dict[str, Any], strategy: dict[str, Any]) -> None:
    steps = 20
    plain = on_ranks(trained, 2, {}, size, steps, timeout=280)
    divided = on_ranks(trained, 2, {"name": "fsdp", **strategy}, size, steps, timeout=280)
    assert divided[0]["losses"] == pytest.approx(plain[0]["losses"], abs=1e-5)
    assert plain[0]["losses"][-1] < plain[0]["losses"][0]
    ratios = [own["state"] / whole["state"] for own, whole in zip(divided, plain, strict=True)]
    peaks = [own["peak"] / whole["peak"] for own, whole in zip(divided, plain, strict=True)]
    print(
        f"{plain[0]['parameters']:,} parameters: state {ratios[0]:.3f} and {ratios[1]:.3f} of DDP's "
        f"{plain[0]['state'] / 2**20:.0f} MiB; peak of the process {peaks[0]:.2f} of {plain[0]['peak'] / 2**20:.0f} MiB"
    )
    if size is LARGE:
        assert 45e6 < plain[0]["parameters"] < 55e6
    assert max(ratios) <= 0.55


@pytest.mark.parametrize(
    ("strategy", "workers", "machines", "offload", "ratio"),
    [({"hybrid": True}, 4, 2, False, 0.55), ({}, 2, 1, True, 0.55)],
    ids=["hybrid", "offload"],
)
def test_the_same_loss_with_hybrid_sharding_and_offload(
    strategy: dict[str, Any], workers: int, machines: int, offload: bool, ratio: float
) -> None:
    """Hybrid: two shards on each of two machines. Offload: as far as it can be tested without a GPU."""
    steps = 10
    plain = on_ranks(trained, workers, {}, SMALL, steps)
    divided = on_ranks(trained, workers, {"name": "fsdp", **strategy}, SMALL, steps, offload, machines=machines)
    for own, whole in zip(divided, plain, strict=True):
        assert own["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        assert own["state"] / whole["state"] <= ratio
