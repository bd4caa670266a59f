"""A model and its optimizer, saved and resumed, continue bit for bit like an uninterrupted training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine import checkpoint
from launcher.errors import CheckpointError


class Net(nn.Module):
    """A network with tied weights, a frozen layer, a buffer that changes, and a parameter without gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.out.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.stem.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.relu(self.out(self.norm(self.stem(x)))))


class Master(Optimizer):
    """An optimizer with float32 state for parameters of any type, nested state, and plain values."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    master = state.setdefault("master", parameter.detach().float().clone())
                    state.setdefault("history", []).append(parameter.grad.norm().detach())
                    state["calls"] = state.get("calls", 0) + 1
                    master -= group["lr"] * parameter.grad.float() / state["calls"]
                    parameter.data.copy_(master)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    names = dict(model.named_parameters())
    stem = [names.pop("stem.weight"), names.pop("stem.bias")]
    return [{"params": stem, "lr": 0.01, "match": "stem.*", "scale": (1, 2.5)}, {"params": list(names.values())}]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sgd with dampening": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.1),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "adam with a tensor as rate": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), foreach=False),
    "master weights": lambda params: Master(params, lr=0.1),
}


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        dtype = next(model.parameters()).dtype
        loss = model(torch.randn(8, 4, dtype=dtype)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def snapshot(model: nn.Module, optimizer: Optimizer) -> Any:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_continues_bit_for_bit(tmp_path: Path, name: str, before: int) -> None:
    dtype = torch.bfloat16 if name == "master weights" else torch.float32
    model = Net().to(dtype)
    optimizer = OPTIMIZERS[name](groups(model))
    train(model, optimizer, range(before))
    checkpoint.Checkpointer(tmp_path).save(
        before, {**checkpoint.training_state(model, optimizer), "rest": 1}, asynchronous=False
    )
    at_save = snapshot(model, optimizer)
    train(model, optimizer, range(before, before + 3))

    for used in (0, 3):  # restore into a new optimizer, and into one that has been stepped
        other = Net(seed=1).to(dtype)
        resumed = OPTIMIZERS[name](groups(other))
        train(other, resumed, range(100, 100 + used))
        content = checkpoint.restore_training(tmp_path / f"step-{before:08d}", other, resumed)
        assert content.state["rest"] == 1
        assert other.out.weight is other.tied.weight
        assert_same(snapshot(other, resumed), at_save)
        train(other, resumed, range(before, before + 3))
        assert_same(snapshot(other, resumed), snapshot(model, optimizer))


def test_reading_the_state_of_a_new_optimizer_changes_nothing() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before, rng = snapshot(model, optimizer), torch.get_rng_state()
    state = checkpoint.training_state(model, optimizer)
    assert state["optimizer"]["state"] == {}
    assert_same(snapshot(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_are_the_names_of_the_unwrapped_module() -> None:
    class Outer(nn.Module):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)  # a name that DistributedDataParallel also uses
            inner = nn.Sequential(nn.Linear(2, 2))
            self.inner: Any = torch.compile(inner) if compiled else inner

    plain = Outer(False)
    compiled: Any = torch.compile(Outer(True))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    assert list(checkpoint.model_state(compiled)) == list(plain.state_dict())
    named = checkpoint.optimizer_state(compiled, optimizer)["param_groups"][0]["params"]
    assert named == [name for name, _ in plain.named_parameters()]
    checkpoint.load_model_state(compiled, plain.state_dict())
    assert_same(dict(checkpoint.model_state(compiled)), dict(plain.state_dict()))


def test_extra_state_of_a_module_is_restored(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    model, other = Counting(2, 2), Counting(2, 2)
    model.calls = 7
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, other)]
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(1, checkpoint.training_state(model, optimizers[0]), asynchronous=False)
    checkpoint.restore_training(tmp_path / "step-00000001", other, optimizers[1])
    assert other.calls == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: [{"params": list(model.parameters())}], r" 2 .* 1\b.*optimizer\.groups"),
        (lambda model: groups(model)[::-1], r"Group 0 .*\bstem\.weight"),
    ],
)
def test_other_parameter_groups_are_rejected(tmp_path: Path, change: Callable[[nn.Module], Any], message: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(groups(model), lr=0.1)
    checkpoint.Checkpointer(tmp_path).save(1, checkpoint.training_state(model, optimizer), asynchronous=False)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_training(tmp_path / "step-00000001", model, torch.optim.SGD(change(model), lr=0.1))


def test_a_mismatching_model_is_rejected_by_name_and_not_changed(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 4), nn.Linear(3, 5)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (model, other)]
    checkpoint.Checkpointer(tmp_path).save(1, checkpoint.training_state(model, optimizers[0]), asynchronous=False)
    before = snapshot(other, optimizers[1])
    with pytest.raises(checkpoint.Mismatch, match=r"model/weight .*\(4, 3\) float32 .*\(5, 3\) float32\b"):
        checkpoint.restore_training(tmp_path / "step-00000001", other, optimizers[1])
    assert_same(snapshot(other, optimizers[1]), before)
