"""Compressed communication: 16-bit means, PowerSGD compared with NumPy, DiLoCo compared with a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launcher.engine.runtime import Runtime
from launcher.engine.strategies.compression import WIRE, PowerSGD, cast_hook
from launcher.engine.strategies.outer import OuterOptimizer
from tests.support.engine_ranks import column, make_job, on_ranks, succeed


def gradient(rank: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(shape, generator=generator)


# ---- in 16 bits -----------------------------------------------------------------------------------------------------


def reduced_by_hook(runtime: Runtime, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(runtime, cast_hook(WIRE[name]))
    x = gradient(runtime.rank, 0, (4, 5))
    wrapped(x).square().sum().backward()
    alone = nn.Linear(5, 3)
    alone.load_state_dict(network.state_dict())
    alone(x).square().sum().backward()
    return {"mean": network.weight.grad, "own": alone.weight.grad}


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("workers", [2, 3])
def test_a_compressed_gradient_is_the_mean_of_cast_gradients(name: str, workers: int) -> None:
    ranks = on_ranks(reduced_by_hook, workers, name)
    small = [(rank["own"] / workers).to(WIRE[name]) for rank in ranks]
    expected = torch.stack([part.double() for part in small]).sum(0)
    epsilon = torch.finfo(WIRE[name]).eps
    for rank in ranks:
        assert torch.equal(rank["mean"], ranks[0]["mean"])
        assert torch.allclose(rank["mean"].double(), expected, rtol=workers * epsilon, atol=workers * epsilon)
        if workers == 2:  # one addition, rounded once
            assert torch.equal(rank["mean"], (small[0] + small[1]).float())


# ---- PowerSGD -------------------------------------------------------------------------------------------------------

SHAPES = ((12, 10), (7,), (8, 3, 5))


def reduced_by_powersgd(runtime: Runtime, steps: int, rank: int, after: int) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    power = PowerSGD(parameters, runtime, rank, after, seed=3)
    first = {index: factor.clone() for index, factor in power.factors.items()}
    means = []
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = gradient(runtime.rank, step, tuple(parameter.shape))
        power.reduce()
        means.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    return {"first": first, "means": means, "errors": power.errors}


@pytest.mark.parametrize(("workers", "rank"), [(2, 2), (3, 1)])
def test_powersgd_equals_a_numpy_implementation_of_the_paper(workers: int, rank: int) -> None:
    steps, after = 5, 1
    ranks = on_ranks(reduced_by_powersgd, workers, steps, rank, after)
    for index, shape in enumerate(SHAPES):
        rows = shape[0]
        matrices = lambda step, shape=shape, rows=rows: [  # noqa: E731
            gradient(worker, step, shape).numpy().astype(np.float64).reshape(rows, -1) for worker in range(workers)
        ]
        factor = ranks[0]["first"].get(index)
        q = None if factor is None else factor.numpy().astype(np.float64)
        errors: list[Any] = [0.0] * workers
        for step in range(steps):
            own = matrices(step)
            if q is None or step < after:
                expected = np.mean(own, axis=0)
            else:
                own = [matrix + error for matrix, error in zip(own, errors, strict=True)]
                p, _ = np.linalg.qr(np.mean([matrix @ q for matrix in own], axis=0))
                q = np.mean([matrix.T @ p for matrix in own], axis=0)
                expected = p @ q.T
                errors = [matrix - expected for matrix in own]
            for worker in ranks:
                found = worker["means"][step][index].numpy().reshape(rows, -1)
                assert np.allclose(found, expected.reshape(rows, -1), atol=1e-4), (step, shape)
                assert torch.equal(worker["means"][step][index], ranks[0]["means"][step][index])
        if q is not None:
            for worker, error in zip(ranks, errors, strict=True):
                assert np.allclose(worker["errors"][index].numpy(), error, atol=1e-4)


def test_powersgd_feeds_its_error_back() -> None:
    # Summed over all steps, the applied gradients and the remaining error equal the true gradients.
    steps = 30
    ranks = on_ranks(reduced_by_powersgd, 2, steps, 1, 0)
    for index in ranks[0]["errors"]:
        both = [gradient(rank, step, SHAPES[index]) for step in range(steps) for rank in range(2)]
        true = torch.stack(both).sum(0) / 2
        applied = torch.stack([mean[index] for mean in ranks[0]["means"]]).sum(0)
        remaining = (ranks[0]["errors"][index] + ranks[1]["errors"][index]).view(SHAPES[index]) / 2
        assert torch.allclose(applied + remaining, true, atol=1e-3)


def test_errors_saved_by_another_number_of_workers_keep_their_mean() -> None:
    parameters = [nn.Parameter(torch.zeros(12, 10))]
    power = PowerSGD(parameters, Runtime.single("cpu"), 1, 0, seed=0)
    saved = [{0: gradient(rank, 0, (12, 10))} for rank in range(3)]
    power.load_errors(saved)
    mean = (saved[0][0] + saved[1][0] + saved[2][0]) / 3
    assert torch.allclose(power.errors[0], mean, atol=1e-6)  # so the mean over any number of workers is the same
    parameters[0].grad = torch.ones(12, 10)
    power.reduce()  # a single worker applies the error at once
    assert torch.allclose(parameters[0].grad, 1 + mean, atol=1e-6)
    assert not power.errors[0].any()


def unused(runtime: Runtime) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.zeros(12, 10)) for _ in range(3)]
    power = PowerSGD(parameters, runtime, 1, 0, seed=0)
    parameters[0].grad = gradient(0, 0, (12, 1)) @ gradient(0, 1, (1, 10))
    if runtime.rank == 1:
        parameters[1].grad = parameters[0].grad.clone()
    power.reduce()
    return {"grads": [parameter.grad for parameter in parameters]}


def test_a_parameter_used_by_one_of_two_workers_has_half_the_gradient_and_an_unused_one_has_none() -> None:
    for rank in on_ranks(unused, 2):
        both, one, none = rank["grads"]
        assert none is None
        assert torch.allclose(one, both / 2, atol=1e-5)


def test_powersgd_trains(tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 66, "model": {"_target_": "Net", "width": 40}, "log_every": 20}
    succeed(make_job(**how), tmp_path / "plain", 2)
    strategy = {"compression": "powersgd", "powersgd_rank": 2, "powersgd_after": 5}
    succeed(make_job(strategy=strategy, **how), tmp_path / "powersgd", 2)
    plain, found = (column(tmp_path / name, "train/loss")[-1] for name in ("plain", "powersgd"))
    assert found < 1.05 * plain


@pytest.mark.slow
def test_powersgd_reaches_the_loss_of_plain_ddp_on_mnist(tmp_path: Path) -> None:
    """1,000 steps on gloo reach the loss within 1%, without a hang."""
    how: dict[str, Any] = {
        "steps": 1000,
        "model": {"_target_": "models.vision.MLP", "width": 128},
        "data": {"_target_": "models.vision_data.Mnist"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05},
        "log_every": 250,
        "evaluate_every": 1000,
    }
    losses = {}
    for name, strategy in (("plain", {}), ("powersgd", {"compression": "powersgd"})):
        succeed(make_job(strategy=strategy, **how), tmp_path / name, 2, timeout=280)
        losses[name] = column(tmp_path / name, "val/loss")[-1]
    print(losses)
    assert losses["powersgd"] <= 1.01 * losses["plain"]


# ---- DiLoCo ---------------------------------------------------------------------------------------------------------


def trained_apart(runtime: Runtime, steps: int, options: dict[str, Any]) -> list[torch.Tensor]:
    """Train with Adam as inner optimizer and another loss on each worker. Return θ and the replica of each step."""
    weight = nn.Parameter(torch.ones(6, 3))
    inner = torch.optim.Adam([weight], lr=0.05)
    outer = OuterOptimizer(inner, [weight], runtime, total_steps=steps, **options)
    seen = []
    for step in range(steps):
        weight.grad = gradient(runtime.rank, step, (6, 3)) + weight.detach()
        inner.step()
        seen += [outer.weights[0].clone(), weight.detach().clone()]
    return seen


@pytest.mark.parametrize("delay", [0, 2])
def test_diloco_equals_a_plain_loop(delay: int) -> None:
    steps, every, lr, mu, workers = 14, 4, 0.7, 0.9, 2
    options = {"every": every, "lr": lr, "momentum": mu, "delay": delay}
    found = on_ranks(trained_apart, workers, steps, options)

    theta = nn.Parameter(torch.ones(6, 3))
    outer = torch.optim.SGD([theta], lr=lr, momentum=mu, nesterov=True)
    replicas = [nn.Parameter(torch.ones(6, 3)) for _ in range(workers)]
    inner = [torch.optim.Adam([replica], lr=0.05) for replica in replicas]
    sent: list[torch.Tensor] | None = None
    for step in range(1, steps + 1):
        for rank, (replica, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            replica.grad = gradient(rank, step - 1, (6, 3)) + replica.detach()
            optimizer.step()
        last = step == steps
        if sent is not None and (last or step % every == delay):
            moved = [replica.detach() - then for replica, then in zip(replicas, sent, strict=True)]
            outer.step()
            for replica, more in zip(replicas, moved, strict=True):
                replica.data.copy_(theta.detach()).add_(more)
            sent = None
        if step % every == 0 or last:
            first, second = ((theta.detach() - replica.detach()) / workers for replica in replicas)
            theta.grad = first + second
            sent = [replica.detach().clone() for replica in replicas]
            if not delay or last:
                outer.step()
                for replica in replicas:
                    replica.data.copy_(theta.detach())
                sent = None
        for rank in range(workers):
            shown, own = found[rank][2 * step - 2], found[rank][2 * step - 1]
            if math.isclose(delay, 0):
                assert torch.equal(shown, theta.detach()), step
                assert torch.equal(own, replicas[rank].detach()), step
            else:
                assert torch.allclose(shown, theta.detach(), atol=1e-6), step
                assert torch.allclose(own, replicas[rank].detach(), atol=1e-6), step
    assert torch.equal(found[0][-1], found[1][-1])


def test_local_sgd_is_the_mean_of_the_replicas() -> None:
    found = on_ranks(trained_apart, 3, 3, {"every": 3})
    before = []
    for rank in range(3):
        weight = nn.Parameter(torch.ones(6, 3))
        inner = torch.optim.Adam([weight], lr=0.05)
        for step in range(3):
            weight.grad = gradient(rank, step, (6, 3)) + weight.detach()
            inner.step()
        before.append(weight.detach())
    for rank in range(3):
        assert torch.allclose(found[rank][-1], torch.stack(before).mean(0), atol=1e-6)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_low_precision_only_rounds_the_differences(wire: torch.dtype) -> None:
    # The differences are rounded to 8 or 11 bits, not the weights, which are about 1.
    exact = on_ranks(trained_apart, 2, 4, {"every": 4})
    rounded = on_ranks(trained_apart, 2, 4, {"every": 4, "wire": wire})
    assert torch.equal(rounded[0][-1], rounded[1][-1])
    moved = (exact[0][-1] - 1).abs().max()
    assert (rounded[0][-1] - exact[0][-1]).abs().max() <= 3 * torch.finfo(wire).eps * moved
