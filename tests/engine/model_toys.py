"""Networks that change themselves while they compute, for tests that the engine preserves a model."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.engine_toys import CLASSES, FEATURES, MODELS, RECORD

HERE = __name__


class Plain(nn.Module):
    """A perceptron for batches of `Points`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, CLASSES)
        MODELS.append(self)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        return {"loss": F.cross_entropy(self.head(self.hidden(x)), y, reduction="none")}


class Meddling(Plain):
    """Changes everything in a module that can be changed, in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.teacher[1].eval()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.calls = 0
        self.losses: list[float] = []
        self.queue = torch.zeros(3)  # a plain attribute
        self.codes: Tensor
        self.register_buffer("codes", torch.zeros(4))
        self.generator = torch.Generator().manual_seed(3)
        self.dice = random.Random(4)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        self.calls += 1
        answer = super().training_step((self.norm(x), y, _))
        self.losses.append(float(answer["loss"].detach().sum()))
        with torch.no_grad():
            for own, other in zip(self.teacher[0].parameters(), self.stem.parameters(), strict=True):
                own.lerp_(other, 0.1)  # as in BYOL and MoCo
            self.queue[self.calls % 3] = self.dice.random() + float(torch.rand((), generator=self.generator))
            self.codes = self.codes + torch.rand(4)  # replaces the tensor
        self.register_forward_hook(lambda *_: None)
        if self.training and torch.is_grad_enabled():
            RECORD.append(("modes", self.teacher[1].training, self.head.training))
        return {"loss": answer["loss"] + self.teacher(x).sum(1) * 0}

    def examples(self, batch: Any) -> dict[str, Any]:
        self.train()
        self.training_step(batch)
        return {"text": "none"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the state of a model and of the process that checks must not change, in comparable form."""
    state: dict[str, Any] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state |= {f"identity of {name}": id(value) for name, value in model.state_dict(keep_vars=True).items()}
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = len(module._forward_hooks)
    for name, parameter in model.named_parameters():
        state[f"trained {name}"] = parameter.requires_grad
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    if isinstance(model, Meddling):
        state |= {"calls": model.calls, "losses": list(model.losses), "queue": model.queue.clone()}
        state |= {"generator": model.generator.get_state(), "dice": model.dice.getstate()}
    return {**state, "torch": torch.get_rng_state(), "python": random.getstate()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return [name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name))]


class Collecting(Plain):
    """Collects statistics of each rank's data in buffers; some affect training.

    Args:
        rules: its `merge_buffers`.
        grows: whether one buffer has a different size on each rank.
    """

    def __init__(self, rules: dict[str, str] | None = None, grows: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.codes: Tensor
        self.top: Tensor
        self.low: Tensor
        self.seen: Tensor
        self.register_buffer("codes", torch.zeros(8))
        self.register_buffer("top", torch.zeros((), dtype=torch.int64))
        self.register_buffer("low", torch.zeros(2, 3, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.merge_buffers = rules if rules is not None else {"top": "max", "low": "mean"}
        self.grows = grows

    def hidden(self, x: Tensor) -> Tensor:
        hidden = self.norm(super().hidden(3 * x + 1))
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.codes.lerp_(hidden.mean(0) + x.mean(), 0.1)
                self.top.clamp_(min=int(1000 * x.abs().max()))
                self.low += x.mean().to(torch.bfloat16)
                if self.grows:
                    self.seen = torch.cat([self.seen, x[: int(x[0, 0] > 0) + 1, 0] > 0])
        return hidden + 0.1 * self.codes


class Frozen(Plain):
    """Freezes its stem in the constructor. Training does not depend on the number of workers.

    Args:
        inside: the step in which `training_step` itself trains the stem, on the rank `only`, or on all.
        alone: whether rank 1 adds an extra gradient in that step instead.
    """

    def __init__(self, inside: int = 0, only: int | None = None, alone: bool = False) -> None:
        super().__init__()
        self.stem.requires_grad_(False)
        self.inside, self.only, self.alone, self.steps = inside, only, alone, 0

    def training_step(self, batch: Any) -> dict[str, Any]:
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.steps == self.inside and self.only in (None, rank):
            if self.alone:
                with torch.no_grad():
                    self.head.weight[0, 0] += 1e-4
            else:
                self.stem.requires_grad_(True)
        return super().training_step(batch)


class Switching:
    """A callback that freezes and unfreezes parts of the network: {step: {part: trained}}.

    Args:
        only: the only rank that does it.
    """

    def __init__(self, plan: dict[int, dict[str, bool]], hook: str = "on_step", only: int | None = None) -> None:
        self.plan, self.hook, self.only = {int(step): parts for step, parts in plan.items()}, hook, only

    def on_start(self, run: Any) -> None:
        self._switch("on_start", run)

    def on_step(self, run: Any) -> None:
        self._switch("on_step", run)

    def on_evaluate(self, run: Any) -> None:
        self._switch("on_evaluate", run)

    def _switch(self, hook: str, run: Any) -> None:
        for part, trained in self.plan.get(run.step, {}).items():
            if self.only in (None, run.rank) and self.hook == hook:
                run.model.get_submodule(part).requires_grad_(trained)


class Waves(Plain):
    """Complex weights with zero, one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.randn(FEATURES, 8, dtype=torch.complex64))
        self.shift = nn.Parameter(torch.zeros(8, dtype=torch.complex64))
        self.turn = nn.Parameter(torch.tensor(1.0 + 1.0j))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8, dtype=torch.complex64))
        self.merge_buffers = {"mean": "mean"}

    def hidden(self, x: Tensor) -> Tensor:
        y = x.to(torch.complex64) @ self.wave * self.turn + self.shift
        if self.training and torch.is_grad_enabled():
            self.mean.lerp_(y.detach().mean(0), 0.1)
        return torch.tanh(self.stem(x)) + torch.tanh(y.real) + torch.sin(y.imag)


class Precise(Plain):
    """A network in float64."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.double()
        if mixed:
            self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        return super().training_step((x.double() * getattr(self, "scale", 1.0), y, number))
