"""Random models, data and schedules, and the plain loop that their runs are compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from launcher.config import Job
from launcher.engine.order import mix
from tests.support import engine_toys as toys
from tests.support.engine_ranks import make_job

FEATURES, CLASSES = 3, 2
THEIRS = "torch.optim.lr_scheduler"


class DrawnData:
    """Data in memory. Batches are (x (B, FEATURES), y (B, CLASSES), number (B,))."""

    def __init__(self, train: int, val: int, num_workers: int = 0) -> None:
        self.train, self.val = samples(train, 1), samples(val, 2)
        self.num_workers = num_workers


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = x[:, :CLASSES] * 0.7 + 0.3 * torch.randn(count, CLASSES, generator=generator)
    return TensorDataset(x, y, torch.arange(count))


class Drawn(nn.Module):
    """A perceptron with properties that are difficult in data-parallel training. Records the samples of each batch.

    Args:
        norm: a BatchNorm behind each hidden layer.
        tied: one weight for all hidden layers.
        frozen: hidden layers that are not trained.
        teacher: a frozen BatchNorm in evaluation mode in front.
        unused: a layer that is never used.
        gated: a layer that only training batches with certain samples use.
        buffers: a counter of batches and a running mean of the input.
        double: the last layer is float64.
        weighted: the loss is a mean over weights and not over samples.
    """

    count: Tensor
    mean: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        norm: bool,
        dropout: float,
        tied: bool,
        frozen: Sequence[int],
        teacher: bool,
        unused: bool,
        gated: bool,
        buffers: bool,
        double: bool,
        weighted: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        layers = [nn.Linear(width, width) for _ in range(depth)]
        for layer in layers[1:] if tied else []:
            layer.weight = layers[0].weight
        for index in frozen:
            layers[index].requires_grad_(False)
        self.hidden = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) if norm else nn.Identity() for _ in layers])
        self.dropout = nn.Dropout(dropout)
        self.teacher = nn.BatchNorm1d(FEATURES).eval().requires_grad_(False) if teacher else None
        if self.teacher is not None:
            nn.init.constant_(self.teacher.get_buffer("running_mean"), 0.5)
        self.head = nn.Linear(width, CLASSES, dtype=torch.float64 if double else torch.float32)
        self.unused = nn.Linear(2, 2) if unused else None
        self.gate = nn.Linear(FEATURES, CLASSES) if gated else None
        if buffers:
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(FEATURES))
        self.buffered, self.weighted = buffers, weighted
        toys.MODELS.append(self)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        if self.training:
            toys.RECORD.append(("batch", number.tolist()))
            if self.buffered:
                self.count += 1
                self.mean.lerp_(x.mean(0), 0.1)
        h = self.stem(x if self.teacher is None else self.teacher(x))
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            h = self.dropout(torch.tanh(norm(layer(h))))
        out = self.head(h.to(self.head.weight.dtype))
        if self.gate is not None and self.training and bool((number % 4 == 0).any()):
            out = out + self.gate(x)
        loss = ((out - y) ** 2).sum(1)  # (B,)
        if not self.weighted:
            return {"loss": loss}
        weights = 1.0 + number % 3
        return {"loss": ((loss * weights).sum(), weights.sum())}


# Names of torch. eps prevents that a gradient which is 0 up to rounding becomes a full step.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.02, "eps": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 0.02, "eps": 1e-2, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "eps": 1e-2},
    "Adagrad": {"lr": 0.05, "eps": 1e-2},
}
SCHEDULES = ("none", "ours", "cosine", "one cycle", "polynomial", "sequential", "chained", "step", "plateau")


@dataclass(frozen=True)
class Draw:
    """The settings of a run. `model`: arguments of `Drawn`. `stop`: the step at which it is stopped and resumed."""

    model: dict[str, Any]
    workers: int
    train: int
    val: int
    batch: int
    microbatch: int | None
    epochs: int
    seed: int
    optimizer: str
    schedule: str
    by_epoch: bool
    clip: float | None
    slow_head: bool
    deterministic: bool
    loaders: int
    stop: int | None
    drop_at: int | None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train // self.batch)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def length(self) -> int:
        """Return the length of the schedule."""
        return self.epochs if self.by_epoch else self.steps

    def job(self) -> Job:
        groups = [{"match": "head.*", "lr": 0.01}] if self.slow_head else []
        job = make_job(
            model={"_target_": "tests.engine.drawn.Drawn", **self.model},
            data={
                "_target_": "tests.engine.drawn.DrawnData",
                "train": self.train,
                "val": self.val,
                "num_workers": self.loaders,
            },
            optimizer={"_target_": f"torch.optim.{self.optimizer}", **OPTIMIZERS[self.optimizer], "groups": groups},
            scheduler=self._section(),
            callbacks={} if self.drop_at is None else {"drop": {"_target_": "Drop", "at": self.drop_at}},
            epochs=self.epochs,
            global_batch_size=self.batch,
            microbatch_size=self.microbatch,
            seed=self.seed,
            clip_norm=self.clip,
            deterministic=self.deterministic,
        )
        return replace(job, trust=["tests.engine", "tests.support"])

    def _section(self) -> dict[str, Any]:
        """Return the schedule without its length, which the engine sets."""
        warm = {"_target_": f"{THEIRS}.LinearLR", "start_factor": 0.5, "total_iters": 2}
        sections: dict[str, dict[str, Any]] = {
            "none": {},
            "ours": {"_target_": "launcher.engine.optim.WarmupCosine", "min_ratio": 0.1},
            "cosine": {"_target_": f"{THEIRS}.CosineAnnealingLR"},
            "one cycle": {"_target_": f"{THEIRS}.OneCycleLR", "max_lr": 0.05, "cycle_momentum": False},
            "polynomial": {"_target_": f"{THEIRS}.PolynomialLR", "power": 2.0},
            "sequential": {
                "_target_": f"{THEIRS}.SequentialLR",
                "schedulers": [warm, {"_target_": f"{THEIRS}.CosineAnnealingLR"}],
                "milestones": [2],
            },
            "chained": {
                "_target_": f"{THEIRS}.ChainedScheduler",
                "schedulers": [warm, {"_target_": f"{THEIRS}.PolynomialLR"}],
            },
            "step": {"_target_": f"{THEIRS}.StepLR", "step_size": 2, "gamma": 0.5},
            "plateau": {"_target_": f"{THEIRS}.ReduceLROnPlateau", "patience": 0, "factor": 0.5},
        }
        section = sections[self.schedule]
        return {**section, "interval": "epoch"} if section and self.by_epoch else section

    def plain_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the same schedule in plain PyTorch, with its length."""
        n = self.length
        if self.schedule == "none":
            return lr_scheduler.ConstantLR(optimizer, 1.0)
        if self.schedule == "ours":
            half = 0.5 * torch.pi
            return lr_scheduler.LambdaLR(optimizer, lambda k: 0.1 + 0.9 * float(np.cos(half * min(1.0, k / n)) ** 2))
        if self.schedule == "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, n)
        if self.schedule == "one cycle":
            return lr_scheduler.OneCycleLR(optimizer, 0.05, n, cycle_momentum=False)
        if self.schedule == "polynomial":
            return lr_scheduler.PolynomialLR(optimizer, n, 2.0)
        if self.schedule == "sequential":
            first = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
            second = lr_scheduler.CosineAnnealingLR(optimizer, max(1, n - 2))
            return lr_scheduler.SequentialLR(optimizer, [first, second], [2])
        if self.schedule == "chained":
            first = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
            return lr_scheduler.ChainedScheduler([first, lr_scheduler.PolynomialLR(optimizer, n)])
        if self.schedule == "step":
            return lr_scheduler.StepLR(optimizer, 2, 0.5)
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@dataclass
class Outcome:
    """The results of a run: loss, learning rate and gradient norm of each step; val/loss by step; the final state."""

    loss: list[float]
    rate: list[float]
    norm: list[float]
    val: dict[int, float]
    state: dict[str, Tensor]


class PlainLoop:
    """Trains a draw with a plain loop in this process: rank by rank, microbatch by microbatch.

    Args:
        shares: for each step and rank, the samples of its microbatches.
    """

    def __init__(self, draw: Draw, shares: Sequence[Sequence[Sequence[Sequence[int]]]]) -> None:
        self.draw, self.shares = draw, shares
        self.data = DrawnData(draw.train, draw.val)
        seed_all(draw.seed)
        self.model = Drawn(**draw.model)
        self.buffers = [self._own_buffers() for _ in range(draw.workers)]
        self.random = []
        for rank in range(draw.workers):
            seed_all(mix(draw.seed, 0, rank))
            self.random.append(torch.get_rng_state())

    def run(self) -> Outcome:
        draw, found = self.draw, Outcome([], [], [], {}, {})
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if name.startswith("head.") and draw.slow_head]
        rest = [p for name, p in trained.items() if not any(p is one for one in head)]
        groups = [{"params": rest}, *([{"params": head, "lr": 0.01}] if head else [])]
        optimizer = getattr(torch.optim, draw.optimizer)(groups, **OPTIMIZERS[draw.optimizer])
        schedule, factor = draw.plain_schedule(optimizer), 1.0
        for step, ranks in enumerate(self.shares, start=1):
            optimizer.zero_grad()
            found.loss.append(self._gradient(ranks))
            grads = [p.grad for p in trained.values() if p.grad is not None]
            found.norm.append(float(torch.nn.utils.get_total_norm(grads)))
            if draw.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(trained.values()), draw.clip)
            scheduled = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, scheduled, strict=True):
                group["lr"] = rate * factor
            found.rate.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, scheduled, strict=True):
                group["lr"] = rate
            ended = step % draw.steps_per_epoch == 0
            if draw.schedule != "plateau" and (ended or not draw.by_epoch):
                schedule.step()
            if step == draw.drop_at:
                factor /= 10
            if ended or step in (draw.stop, draw.steps):
                self._merge()
            if ended or step == draw.steps:
                found.val[step] = self._evaluate()
                if draw.schedule == "plateau":
                    schedule.step(found.val[step])
        found.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        return found

    def _gradient(self, ranks: Sequence[Sequence[Sequence[int]]]) -> float:
        """Compute the gradient of the mean over the global batch, and return the mean."""
        numbers = [number for parts in ranks for part in parts for number in part]
        count = sum(1 + number % 3 for number in numbers) if self.draw.model["weighted"] else len(numbers)
        total = 0.0
        for rank, parts in enumerate(ranks):
            self._put_buffers(self.buffers[rank])
            torch.set_rng_state(self.random[rank])
            for part in parts:
                loss = self._sum(self.data.train, part)
                (loss / count).backward()
                total += loss.item()
            self.random[rank], self.buffers[rank] = torch.get_rng_state(), self._own_buffers()
        return total / count

    def _sum(self, dataset: TensorDataset, numbers: Sequence[int]) -> Tensor:
        loss = self.model.training_step(dataset[torch.tensor(numbers)])["loss"]
        return loss[0] if isinstance(loss, tuple) else loss.sum()

    def _merge(self) -> None:
        """Average the statistics of BatchNorm, and use the other buffers of rank 0."""
        first = self.buffers[0]
        merged = {
            name: torch.stack([own[name] for own in self.buffers]).mean(0)
            if name.startswith("norms.") and value.is_floating_point()
            else value
            for name, value in first.items()
        }
        self.buffers = [{name: value.clone() for name, value in merged.items()} for _ in self.buffers]
        self._put_buffers(merged)

    @torch.no_grad()
    def _evaluate(self) -> float:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        numbers = list(range(self.draw.val))
        weights = sum(1 + number % 3 for number in numbers) if self.draw.model["weighted"] else len(numbers)
        mean = self._sum(self.data.val, numbers).item() / weights
        for module, mode in modes.items():
            module.training = mode
        return mean

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    @torch.no_grad()
    def _put_buffers(self, values: dict[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(values[name])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
