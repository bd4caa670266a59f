"""Training jobs of the checks: generated data, networks of a few thousand weights, and a callback that observes a run.

Nothing here reads a file or needs a network connection, so the checks run on a machine with PyTorch only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


class Pictures:
    """In memory: x (N, 1, 28, 28) float32 with a bright line whose height is the class y (N,)."""

    def __init__(self, train: int = 515, val: int = 64, num_workers: int = 0) -> None:
        self.train, self.val = pictures(train, 1), pictures(val, 2)
        self.num_workers = num_workers


def pictures(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    x = torch.randn(count, 1, 28, 28, generator=generator)
    x[torch.arange(count), 0, 2 * y] += 1.0
    return TensorDataset(x, y)


class PicturesOneByOne(Dataset[Any]):
    """The same images, read sample by sample, so that loader processes are used."""

    def __init__(self, count: int, seed: int) -> None:
        self._pictures = pictures(count, seed)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Any:
        return self._pictures[index]


class Tokens:
    """In memory: x (N, context) and y (N, context) int64, at random. The tokens do not affect the time."""

    def __init__(self, vocabulary: int, context: int, train: int = 64, val: int = 4) -> None:
        self.train, self.val = (_tokens(count, vocabulary, context) for count in (train, val))


def _tokens(count: int, vocabulary: int, context: int) -> TensorDataset:
    rows = torch.randint(vocabulary, (count, context + 1), generator=torch.Generator().manual_seed(3))
    return TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


class Rows:
    """In memory: x (N, width) float32 and y (N,) their sums."""

    def __init__(self, width: int, train: int = 512, val: int = 8) -> None:
        self.train, self.val = (_rows(count, width) for count in (train, val))


def _rows(count: int, width: int) -> TensorDataset:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(4))
    return TensorDataset(x, x.sum(1))


class Perceptron(nn.Module):
    """Linear layers of one width, so that parameters outweigh activations."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
        self.net = nn.Sequential(*parts, nn.Linear(width, 1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": F.mse_loss(self.net(x).squeeze(1), y, reduction="none")}  # (B,)


class Observer:
    """A callback that stores the model and the optimizer of the run, and a copy of the weights after every step.

    Args:
        copies: false disables the copies, which wait for the device.

    Attributes:
        latest: the observer of the last run in this process.
    """

    latest: Observer

    def __init__(self, copies: bool = True) -> None:
        Observer.latest = self
        self._copies = copies
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.history: list[dict[str, Tensor]] = []

    def on_start(self, run: Any) -> None:
        self.model, self.optimizer = run.model, run.optimizer
        self._keep()

    def on_step(self, run: Any) -> None:
        self._keep()

    def _keep(self) -> None:
        if not self._copies:
            return
        assert self.model is not None
        self.history.append({name: _whole(p.detach()).cpu().clone() for name, p in self.model.named_parameters()})


def _whole(value: Tensor) -> Tensor:
    """Return the tensor, gathered if it is sharded."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
