"""Small networks and data sets for the engine's tests, and a notebook (`RECORD`) in which they note what they saw."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# Of this process: the networks that were built, and what they and the data sets noted.
MODELS: list[nn.Module] = []
RECORD: list[Any] = []

FEATURES, CLASSES, LONGEST = 12, 4, 7


def living_children() -> list[int]:
    """Return the processes that this one has started and that still live."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def points(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (N, FEATURES), y (N,) that depends on x, and the number of each sample (N,)."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=random)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(count, CLASSES, generator=random)).argmax(1)
    return x, y, torch.arange(count)


# ---- data -----------------------------------------------------------------------------------------------------------


class Points:
    """In memory: batches are (x (B, FEATURES), y (B,), number (B,))."""

    def __init__(self, train: int = 1037, val: int = 203, several: bool = False) -> None:
        self.train = TensorDataset(*points(train, 1))
        whole = TensorDataset(*points(val, 2))
        self.val = {"near": whole, "far": TensorDataset(*points(3, 3))} if several else whole
        self.test = TensorDataset(*points(17, 4))


class Pictures:
    """In memory: batches are (x (B, 1, 28, 28), y (B,)), as models.vision takes them."""

    def __init__(self, train: int = 1037, val: int = 203) -> None:
        self.train, self.val = self._some(train, 1), self._some(val, 2)

    def _some(self, count: int, seed: int) -> TensorDataset:
        random = torch.Generator().manual_seed(seed)
        y = torch.randint(10, (count,), generator=random)
        x = torch.randn(count, 1, 28, 28, generator=random)
        x[torch.arange(count), 0, 2 * y] += 1.0  # a bright line whose height is the class
        return TensorDataset(x, y)


# ---- networks -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A perceptron. Batches of `Points`.

    Args:
        dropout: share of the hidden units that is dropped.
        note: whether to note (numbers of the samples, their losses) of every training step.
    """

    def __init__(self, width: int = 16, dropout: float = 0.0, note: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)
        self.note = note
        MODELS.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.drop(torch.tanh(self.stem(x))))))  # (B, CLASSES)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, reduction="none")  # (B,)
        if self.note and self.training:
            RECORD.append(("losses", number.tolist(), loss.tolist()))
        return {"loss": loss, "accuracy": logits.argmax(1) == y}


class Summary(Net):
    """Also counts by class: a confusion matrix, and what becomes of it on the global totals."""

    def validation_step(self, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        logits = self(x)
        confusion = torch.zeros(CLASSES, CLASSES).index_put_((y, logits.argmax(1)), torch.ones(len(y)), accumulate=True)
        loss = F.cross_entropy(logits, y, reduction="none")
        return {"loss": loss, "seen": (float(len(y)), 1.0), "confusion": (confusion, len(y))}

    def summarize(self, totals: dict[str, Any]) -> dict[str, float]:
        confusion, count = totals["confusion"]
        RECORD.append(("totals", confusion.tolist(), count))
        return {"right": float(confusion.trace()) / count, "count": count}


class Tokens(Net):
    """Every sample has 1 to LONGEST tokens, and the loss is the mean over tokens: (sum, count) pairs of varying counts."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        lengths = 1 + number % LONGEST  # (B,)
        shifts = torch.arange(LONGEST)
        tokens = x[:, None] + 0.1 * shifts[None, :, None]  # (B, LONGEST, FEATURES)
        losses = F.cross_entropy(self(tokens).flatten(0, 1), y.repeat_interleave(LONGEST), reduction="none")
        kept = (shifts[None] < lengths[:, None]).flatten()
        if self.note and self.training:
            RECORD.append(("losses", number.tolist(), losses[kept].tolist()))
        return {"loss": ((losses * kept).sum(), kept.sum()), "length": lengths.float()}


class Branches(Net):
    """Some parameters are used by no batch, and those of `rare` by certain samples alone.

    Args:
        residue: of the numbers of those samples, by 50. With seed 0 and 100 samples, 14 is in no microbatch of the first
            global batch, and 30 is in the first one.
    """

    def __init__(self, residue: int = 14, never: bool = True) -> None:
        super().__init__()
        self.residue = residue
        self.rare = nn.Linear(FEATURES, CLASSES)
        self.never = nn.Linear(3, 3) if never else nn.Identity()

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        logits = self(x)
        chosen = number % 50 == self.residue
        if bool(chosen.any()):
            logits = logits.index_put((chosen,), logits[chosen] + self.rare(x[chosen]))
        return {"loss": F.cross_entropy(logits, y, reduction="none")}


class Odd(Net):
    """Breaks the contract of `training_step`, from the sample with number 900 on where it can wait (`kind`)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any) -> Any:
        answer = super().training_step(batch)
        loss, late = answer["loss"], bool((batch[2] == 900).any())
        kinds: dict[str, Any] = {
            "scalar": {"loss": loss.mean()},
            "list": [loss],
            "nameless": {"los": loss},
            "text": {"loss": "small"},
            "detached": {"loss": loss.detach()},
            "sum of a shape": {"loss": (loss, len(loss))},
            "new name": {**answer, "extra": loss} if late else answer,
            "lost name": {"loss": loss} if late else answer,
            "new shape": {**answer, "shape": (torch.ones(3 if late else 2), 1)},
        }
        return kinds[self.kind]


class Uneven(Net):
    """Its answers on the first half of the validation samples and on the second differ: `kind` says in what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def validation_step(self, batch: Any) -> Any:
        answer = self.training_step(batch)
        late = bool((batch[2] >= 102).all())
        if self.kind == "names":
            return {**answer, "extra": answer["loss"]} if late else answer
        return {**answer, "shape": (torch.ones(3 if late else 2), 1)}


class Masked(Net):
    """The loss of the first 107 samples of the order alone counts; later batches have no token at all."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        kept = (number % 5 == 0).float() if len(RECORD) < 12 else torch.zeros(len(y))
        return {"loss": ((F.cross_entropy(self(x), y, reduction="none") * kept).sum(), kept.sum())}


class Resting(Net):
    """Keeps one part in evaluation mode, and notes the modes in which the parts of the network are when they train."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.drop.eval()

    def training_step(self, batch: Any) -> Any:
        if torch.is_grad_enabled():
            RECORD.append(("modes", self.training, self.drop.training, self.head.training))
        return super().training_step(batch)


class Talkative(Net):
    """Its `summarize` returns words."""

    def summarize(self, totals: dict[str, Any]) -> Any:
        return "all went well"
