"""Models with defects that appear only at some batch sizes, for the tests of the start check."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


class Points:
    """Points: y is approximately the sum of the four components of x.

    Args:
        collate_draws: random numbers are added in `collate`.
    """

    def __init__(self, n: int = 200, m: int = 40, collate_draws: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n + m, 4, generator=generator)
        y = x.sum(1) + 0.1 * torch.randn(n + m, generator=generator)
        self.train: Dataset[Any] = TensorDataset(x[:n], y[:n])
        self.val: Dataset[Any] = TensorDataset(x[n:], y[n:])
        if collate_draws:
            self.train, self.val = Listed(self.train), Listed(self.val)
            self.collate = noisy


class Listed(Dataset[Any]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


def noisy(samples: list[Any]) -> Any:
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return x + torch.randn(x.shape), y


class Regression(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: str | None = None) -> None:
        super().__init__()
        norms = {"BatchNorm1d": nn.BatchNorm1d, "own": OwnNorm}
        middle = [norms[norm](8)] if norm else []
        self.net = nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"loss": (self(x) - y) ** 2}


class OwnNorm(nn.Module):
    """Batch normalization that is not recognizable by its class name."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class Metric(Regression):
    """Returns a metric in the form `form`, from the method `where`."""

    def __init__(self, kind: str, where: str = "training_step") -> None:
        super().__init__()
        self.kind, self.where = kind, where

    def training_step(self, batch: Any) -> dict[str, Any]:
        return self._answer(batch, self.where == "training_step" and self.training)

    def validation_step(self, batch: Any) -> dict[str, Any]:
        return self._answer(batch, self.where == "validation_step")

    def _answer(self, batch: Any, whole: bool) -> dict[str, Any]:
        x, y = batch
        errors = (self(x) - y) ** 2
        e, n = errors.detach(), len(x)
        forms = {
            "list": lambda: e.tolist(),
            "tuple": lambda: tuple(e.tolist()),
            "tensors": lambda: list(e),
            "pair per sample": lambda: (e, torch.ones(n)),
            "count per sample": lambda: (e.sum(), torch.ones(n)),
            "sum per sample": lambda: (e, n),
            "scalar": lambda: e.mean(),
            "float": lambda: float(e.mean()),
            "complex": lambda: e * 1j,
            "complex pair": lambda: (e.sum() * 1j, n),
            "array": lambda: e.numpy(),
            "no count": lambda: (e.sum(), None),
            "text": lambda: "good",
            "nan": lambda: e * torch.nan,
            "integer": lambda: (e > 1).int(),
            "bool": lambda: e > 1,
            "bfloat16": lambda: e.bfloat16(),
            "pair": lambda: (e.sum(), n),
            "list pair": lambda: [e.sum(), n],
            "vector": lambda: (torch.stack([e.sum(), e.sum()]), n),
            "mean": lambda: (e.mean(), 1),
        }
        return {"loss": errors, "metric": forms[self.kind]()} if whole else {"loss": errors}


class Named(Regression):
    """Returns a metric under `name` from `where`."""

    def __init__(self, name: Any, where: str) -> None:
        super().__init__()
        self.name, self.where = name, where

    def training_step(self, batch: Any) -> dict[str, Any]:
        loss = super().training_step(batch)["loss"]
        return {"loss": loss, self.name: loss.detach()} if self.where == "training_step" else {"loss": loss}

    def validation_step(self, batch: Any) -> dict[str, Any]:
        loss = super().training_step(batch)["loss"]
        return {"loss": loss, self.name: loss} if self.where == "validation_step" else {"loss": loss}

    def summarize(self, totals: Any) -> dict[str, float]:
        return {self.name: 1.0} if self.where == "summarize" else {}


class Contrastive(Regression):
    """Contrasts each sample with the others of its batch. noise: whether random numbers are drawn."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.noise = noise

    def training_step(self, batch: Any) -> dict[str, Any]:
        z = self.net[0](batch[0])
        if self.noise:
            z = z + torch.randn(z.shape)
        return {"loss": F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")}


class Pairwise(Regression):
    """Accepts only batches of even size."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        if len(batch[0]) % 2:
            raise RuntimeError("an odd batch")
        return super().training_step(batch)


class Together(Regression):
    """Calls collectives of `kind` if there is a process group."""

    def __init__(self, kind: str = "all_gather") -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        z = self(x)
        if dist.is_initialized():
            n, sent = dist.get_world_size(), z.detach()
            if self.kind == "padded":
                sizes = [torch.zeros(1, dtype=torch.long) for _ in range(n)]
                dist.all_gather(sizes, torch.tensor([len(x)]))
                sent = F.pad(sent, (0, int(max(sizes)) - len(x)))
            if self.kind == "padded by maximum":
                size = torch.tensor(len(x))
                dist.all_reduce(size, op=dist.ReduceOp.MAX)
                sent = F.pad(sent, (0, int(size) - len(x)))
            if self.kind == "all_reduce":
                dist.all_reduce(sent.mean())
            elif self.kind == "objects":
                dist.all_gather_object([None] * n, len(x))
            else:
                dist.all_gather([torch.zeros_like(sent) for _ in range(n)], sent)
        return {"loss": (z - y) ** 2}


class Lightning(Regression):
    """Has methods of another trainer."""

    def configure_optimizers(self) -> Any:
        raise AssertionError

    def on_validation_epoch_end(self) -> None:
        raise AssertionError

    def train_dataloader(self) -> Any:
        raise AssertionError


class Stepping(Regression):
    """Needs a run of 7 steps on 3 workers."""

    def training_step(self, batch: Any, step: Any) -> dict[str, Any]:  # type: ignore[override]
        assert (step.total_steps, step.world_size) == (7, 3)
        return {**super().training_step(batch), "share": (float(step.step), step.total_steps)}


class Demanding(Regression):
    def training_step(self, batch: Any, step: Any, extra: int) -> dict[str, Any]:  # type: ignore[override]
        raise AssertionError


class ForwardOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WrongRows(Regression):
    """Its `validation_step` returns invalid rows.

    Args:
        how: "none", "count" (one too many), "object" (entries that cannot be sent) or "kind" (depends on the batch).
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def validation_step(self, batch: Any) -> dict[str, Any]:
        x, _ = batch
        answer = self.training_step(batch)
        if self.how == "none":
            return answer
        rows: Any = {"count": [0] * (len(x) + 1), "object": [object()] * len(x), "kind": torch.zeros(len(x), len(x))}
        return {**answer, "rows": rows[self.how]}

    def summarize(self, totals: Any, rows: Any) -> dict[str, float]:
        return {"count": len(rows)}
