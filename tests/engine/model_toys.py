"""Networks of other people, for tests of what the engine does with a model: they change themselves as they compute."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.engine_toys import CLASSES, FEATURES, MODELS, RECORD

HERE = __name__


class Plain(nn.Module):
    """A perceptron over batches of `Points` that notes nothing."""

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
    """Changes, at every step, everything of a module that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.teacher[1].eval()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.calls = 0
        self.losses: list[float] = []
        self.queue = torch.zeros(3)  # neither parameter nor buffer
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
                own.lerp_(other, 0.1)  # as BYOL and MoCo do
            self.queue[self.calls % 3] = self.dice.random() + float(torch.rand((), generator=self.generator))
            self.codes = self.codes + torch.rand(4)  # another tensor under the same name
        self.register_forward_hook(lambda *_: None)
        if self.training and torch.is_grad_enabled():
            RECORD.append(("modes", self.teacher[1].training, self.head.training))
        return {"loss": answer["loss"] + self.teacher(x).sum(1) * 0}

    def examples(self, batch: Any) -> dict[str, Any]:
        self.train()
        self.training_step(batch)
        return {"text": "none"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model and of the process that a look at it may not change, in comparable form."""
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
