"""Small networks and data sets for tests of the engine, and `RECORD`, the list of their observations."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

# Of this process: the networks that were built, and what they and the data sets noted.
MODELS: list[nn.Module] = []
RECORD: list[Any] = []

FEATURES, CLASSES, LONGEST = 12, 4, 7


def living_children() -> list[int]:
    """Return the running child processes of this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def points(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (N, FEATURES), y (N,) that depends on x, and the number of each sample (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(count, CLASSES, generator=generator)).argmax(1)
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
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(10, (count,), generator=generator)
        x = torch.randn(count, 1, 28, 28, generator=generator)
        x[torch.arange(count), 0, 2 * y] += 1.0  # a bright line whose height is the class
        return TensorDataset(x, y)


class Flowless:
    """`Points` for training, without validation data."""

    def __init__(self) -> None:
        self.train = TensorDataset(*points(100, 1))


class Samples(Dataset[Any]):
    """A data set that is read sample by sample. torch, random and NumPy each change every sample at random.

    Args:
        bad: the sample that cannot be read: `raises` "value", "os" or "bug" there.
        noise: whether samples are changed.
    """

    def __init__(self, count: int, bad: int | None = None, raises: str = "value", noise: bool = True) -> None:
        self.x, self.y, _ = points(count, 1)
        self.bad, self.raises, self.noise = bad, raises, noise

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if index == self.bad:
            if self.raises == "value":
                raise ValueError(f"digits.csv, row {index}: expected 785 numbers, found 3.")
            if self.raises == "os":
                raise OSError(5, "Input/output error", f"picture-{index}.png")
            missing: dict[str, int] = {}
            return self.x[missing["label"]], self.y[0], 0
        noise = torch.randn(FEATURES) + random.gauss(0, 1) + float(np.random.normal()) if self.noise else 0.0
        return self.x[index] + 0.1 * noise, self.y[index], index


class Augmented:
    """`Samples` for training and validation."""

    def __init__(self, train: int = 1037, val: int = 203, num_workers: int = 0, **how: Any) -> None:
        self.train, self.val = Samples(train, **how), Samples(val, noise=False)
        self.num_workers = num_workers


class Drawing(Points):
    """`Points` with a random change of every batch, in `collate` or in `__getitems__`."""

    def __init__(self, collates: bool, num_workers: int, train: int = 450) -> None:
        super().__init__(train)
        self.num_workers = num_workers
        if collates:
            self.collate = self._changed
        else:
            self.train = DrawingBatches(*points(train, 1))

    @staticmethod
    def _changed(samples: list[Any]) -> Any:
        x, y, number = default_collate(samples)
        return x + 0.1 * torch.randn(x.shape) + random.gauss(0, 0.1) + 0.1 * float(np.random.normal()), y, number


class DrawingBatches(TensorDataset):
    def __getitems__(self, indices: list[int]) -> Any:
        return Drawing._changed([self[index] for index in indices])


class Chosen(Points):
    """Data that is read sample by sample. `weighted`: draw even samples only. `weights`: the attribute `weights`."""

    def __init__(
        self, weighted: bool = False, weights: Any = None, streams: bool = False, num_workers: int = 0
    ) -> None:
        super().__init__(val=50)
        self.train = Flow(250, "") if streams else Samples(250)  # type: ignore[assignment]
        self.num_workers = num_workers
        self.weights = weights
        if weighted:
            self.weights = [float(number % 2 == 0) for number in range(250)]


class Deadly(Points):
    """Data that is read sample by sample; the process that reads sample `bad` exits by a signal or with a status.

    Args:
        once: a file that is made then; where it is there already nothing happens.
    """

    def __init__(self, bad: int = 900, ends: int = -signal.SIGKILL, num_workers: int = 1, once: str = "") -> None:
        super().__init__()
        self.train = DeadlySamples(bad, ends, once)  # type: ignore[assignment]
        self.num_workers = num_workers


class DeadlySamples(Samples):
    def __init__(self, bad: int, ends: int, once: str) -> None:
        super().__init__(1037, noise=False)
        self.deadly, self.ends, self.once = bad, ends, once

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if index == self.deadly and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            if self.ends > 0:
                os._exit(self.ends)
            os.kill(os.getpid(), -self.ends)
        return super().__getitem__(index)


class Sequences(Dataset[Any]):
    """Samples of 1 to 23 tokens: (x (T, FEATURES), y, number). With `sort` it has `lengths`, the numbers of tokens."""

    def __init__(self, count: int, seed: int, sort: bool) -> None:
        self.x, self.y, self.number = points(count, seed)
        self.counts = [1 + int(n) * 7 % 23 for n in self.number]
        if sort:
            self.lengths = self.counts

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        tokens = torch.arange(self.counts[index])[:, None]
        return self.x[index] + 0.1 * tokens, self.y[index], index


class Ragged:
    """`Sequences`, padded to the longest of a microbatch: (x (B, T, FEATURES), y (B,), number (B,), mask (B, T))."""

    def __init__(self, train: int = 1037, val: int = 203, sort: bool = True, num_workers: int = 0) -> None:
        self.train, self.val = Sequences(train, 1, sort), Sequences(val, 2, sort)
        self.num_workers = num_workers

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        x = nn.utils.rnn.pad_sequence([sample[0] for sample in samples], batch_first=True)
        lengths = torch.tensor([len(sample[0]) for sample in samples])
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        return x, torch.stack([sample[1] for sample in samples]), torch.tensor([s[2] for s in samples]), mask


class Flow(TensorDataset):
    """`Points` as a stream: pieces of 50 samples, distributed over the ranks."""

    def __init__(self, count: int, raises: str) -> None:
        super().__init__(*points(count, 1))
        self.raises = raises

    def stream(self, rank: int, world_size: int, seed: int, apply: Any = map) -> Any:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).split(50)
        for number, piece in enumerate(order[rank::world_size] if self.raises != "empty" else []):
            if self.raises == "value" and number == 2:
                raise ValueError("shard-3.parquet, row 7: expected a number.")
            if self.raises == "bug" and number == 2:
                raise KeyError("label")
            yield tuple(tensor[piece] for tensor in self.tensors)


class Flowing:
    """`Flow` as training data."""

    def __init__(self, train: int = 600, raises: str = "") -> None:
        self.train, self.val = Flow(train, raises), TensorDataset(*points(50, 2))


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


class Slow(Net):
    """A slow network: each batch takes a fixed time, longer in evaluation than in training."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        time.sleep(0.02)
        return super().training_step(batch)

    def validation_step(self, batch: Any) -> dict[str, Any]:
        time.sleep(0.1)
        return super().training_step(batch)


class Summary(Net):
    """Also returns a confusion matrix, and summarizes its global total."""

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
    """Every sample has 1 to LONGEST tokens. The loss is the mean over tokens: pairs (sum, count) of varying counts."""

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


class Padded(Net):
    """A network over `Ragged`. The loss is a mean over tokens without the padding.

    Notes the numbers of the samples of a microbatch, and how many tokens of it were padding.
    """

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number, mask = batch
        logits = self(x).transpose(1, 2)  # (B, CLASSES, T)
        losses = F.cross_entropy(logits, y[:, None].expand(mask.shape), reduction="none")  # (B, T)
        if self.training and torch.is_grad_enabled():
            RECORD.append(("batch", number.tolist(), int((~mask).sum())))
        return {"loss": ((losses * mask).sum(), mask.sum())}


class Tied(Net):
    """A network with a tied, a frozen and a half-precision weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(16, 16, bias=False)
        self.tail.weight = self.middle.weight
        self.still = nn.Parameter(torch.ones(3), requires_grad=False)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any) -> dict[str, Any]:
        if self.training and torch.is_grad_enabled():
            self.seen.fill_(1)
        return super().training_step(batch)


class Watching:
    """A callback that records its calls. `fails_in`: the method that fails; `stop_at`: the step after which `rank`
    wants to stop.
    """

    def __init__(self, fails_in: str = "", stop_at: int = 0, rank: int = 0) -> None:
        self.fails_in, self.stop_at, self.rank, self.calls = fails_in, stop_at, rank, 0

    def _note(self, what: str, run: Any) -> None:
        RECORD.append((what, run.rank, run.step, run.epoch, run.samples, self.calls))
        if what == self.fails_in:
            raise KeyError("a callback's own mistake")

    def on_start(self, run: Any) -> None:
        self._note("on_start", run)
        assert run.total_steps == 22
        assert run.device.type == "cpu"
        assert (run.directory / "checkpoints").parent.is_dir()

    def on_step(self, run: Any) -> None:
        self.calls += 1
        self._note("on_step", run)
        if run.step == self.stop_at and run.rank == self.rank:
            run.stop("enough")
        if run.step % 2 == 0:
            run.log({"own/calls": self.calls, "own/rank": run.rank})

    def on_evaluate(self, run: Any) -> None:
        self._note("on_evaluate", run)
        RECORD.append(("metrics", run.metrics["val/loss"]))

    def on_log(self, run: Any, step: int, values: dict[str, float]) -> None:
        assert step == run.step
        if self.fails_in == "on_log":
            raise KeyError("a callback's own mistake")
        RECORD.append(("on_log", step, dict(values)))

    def on_end(self, run: Any) -> None:
        self._note("on_end", run)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Drop:
    """A callback that divides the learning rate by ten after step `at`."""

    def __init__(self, at: int) -> None:
        if at < 0:
            raise ValueError(f"a step is at least 0, not {at}")
        self.at = at

    def on_step(self, run: Any) -> None:
        if run.step == self.at:
            for group in run.optimizer.param_groups:
                group["lr"] /= 10


class Stubborn(torch.optim.SGD):
    """Rejects the parameters."""

    def step(self, closure: Any = None) -> Any:
        raise ValueError("this optimizer wants a model of convolutions")


class Defective(torch.optim.SGD):
    """Raises an exception in its constructor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.rate = self.defaults["learning_rate"]


class Table(nn.Module):
    """An embedding of the number of each sample of `Points`, and layers behind it unless it stands `alone`.

    `tied`: the embedding scores the classes, too.
    """

    def __init__(self, sparse: bool = True, alone: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 1 if alone else CLASSES, sparse=sparse)
        self.head = nn.Identity() if alone else nn.Linear(CLASSES, CLASSES)
        self.tied = tied
        MODELS.append(self)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        rows = self.table(number % 37)  # (B, CLASSES); rows occur several times in a batch, and some in none
        if self.table.weight.shape[1] == 1:
            return {"loss": (rows.squeeze(1) - x[:, 0]) ** 2}
        logits = self.head(rows) + x[:, :CLASSES]
        return {
            "loss": F.cross_entropy(logits @ self.table.weight[:CLASSES] if self.tied else logits, y, reduction="none")
        }


class Branches(Net):
    """A network with parameters that no batch uses, and parameters (`rare`) that only certain samples use.

    Args:
        residue: of the numbers of those samples, by 50. With seed 0 and 100 samples a step, 14 is in no microbatch of
            the first step, and 30 is in its first one.
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
    """Violates the contract of `training_step` in the way `kind`, if possible from sample 900 on."""

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
    """Returns different results for the first and the second half of the validation samples; `kind`: the difference."""

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
    """Only the first 107 samples of the order have tokens; later batches have none."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        kept = (number % 5 == 0).float() if len(RECORD) < 12 else torch.zeros(len(y))
        return {"loss": ((F.cross_entropy(self(x), y, reduction="none") * kept).sum(), kept.sum())}


class Resting(Net):
    """Keeps one part in evaluation mode, and records the modes of its parts during training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.drop.eval()

    def training_step(self, batch: Any) -> Any:
        if torch.is_grad_enabled():
            RECORD.append(("modes", self.training, self.drop.training, self.head.training))
        return super().training_step(batch)


class Showing(Net):
    """Returns examples of the form `kind`. Records the arguments of the calls."""

    def __init__(self, kind: str = "good", dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.kind = kind

    def examples(self, batch: Any) -> Any:
        RECORD.append(("examples", len(batch[2]), self.training, torch.is_grad_enabled(), float(torch.rand(()))))
        if self.kind == "raises":
            raise KeyError("no picture")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3, 2))
        figure.subplots().plot([1, 2, 3])
        good = {
            "picture": torch.rand(3, 8, 8),
            "grid": torch.randint(0, 256, (11, 1, 5, 4), dtype=torch.uint8),
            "sound": (torch.linspace(-2, 2, 800), 8000),
            "words": "**one** two",
            "figure": figure,
        }
        kinds = {"good": good, "number": {"odd": 5}, "shape": {"odd": torch.rand(5, 5)}, "metric": {"loss": "text"}}
        return {**kinds, "list": [1]}[self.kind]


class Talkative(Net):
    """Its `summarize` returns text instead of numbers."""

    def summarize(self, totals: dict[str, Any]) -> Any:
        return "all went well"


class Explosive(Net):
    """Fails in training on a batch with a certain sample.

    Args:
        kind: "nan" or "inf": the loss of that sample; "gradient": the loss is finite and its gradient is not; "raise":
            an exception; "exit": the process dies.
        sample: its number; None for all.
    """

    def __init__(self, kind: str, sample: int | None = 900) -> None:
        super().__init__()
        self.kind, self.sample = kind, sample

    def training_step(self, batch: Any) -> Any:
        answer = super().training_step(batch)
        here = torch.ones_like(batch[2], dtype=torch.bool) if self.sample is None else batch[2] == self.sample
        if not (self.training and torch.is_grad_enabled() and bool(here.any())):
            return answer
        loss = answer["loss"]
        if self.kind == "raise":
            return self.helper(loss)
        if self.kind == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "gradient":
            return {**answer, "loss": loss + here * (loss - loss.detach()).abs().sqrt()}  # the slope of the root at 0
        return {**answer, "loss": torch.where(here, float(self.kind), loss)}

    def helper(self, loss: Tensor) -> Any:
        raise KeyError(f"no such thing among {len(loss)}")


class Normed(Net):
    """With batch normalisation and dropout, whose results depend on how a batch is split."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.stem = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16))  # type: ignore[assignment]


class Other(Net):
    """`Net` with one more layer, and one layer with another name."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = self.head
        del self.head
        self.extra = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.tail(torch.tanh(self.middle(torch.tanh(self.stem(x))))))


class Noisy(Net):
    """Records the random numbers that a training step draws."""

    def training_step(self, batch: Any) -> Any:
        if torch.is_grad_enabled():
            RECORD.append(("random", float(torch.rand(()))))
        return super().training_step(batch)


class Loud(Net):
    """Prints."""

    def __init__(self) -> None:
        super().__init__()
        print("built")

    def training_step(self, batch: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            print("a step of", len(batch[2]))
        return super().training_step(batch)


class FullDisk:
    """A callback that makes a file of the run unwritable, like a full disk."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_start(self, run: Any) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor of the listing itself
                if os.readlink(f"/proc/self/fd/{number}").endswith(f"/{self.file}"):
                    os.dup2(full, int(number))


class Steep(Net):
    """Its gradients overflow float16 with the initial loss scale."""

    def training_step(self, batch: Any) -> Any:
        answer = super().training_step(batch)
        return {**answer, "loss": 1000 * answer["loss"]}


class Weighted(Net):
    """The loss is a weighted mean with fractional weights."""

    def training_step(self, batch: Any) -> Any:
        x, y, number = batch
        weights = 0.001 + (number % 17).float() / 700
        return {"loss": ((weights * F.cross_entropy(self(x), y, reduction="none")).sum(), weights.sum())}


class Annealed(Net):
    """Its loss depends on the step, which it records. Validation uses `training_step`."""

    def training_step(self, batch: Any, step: Any) -> dict[str, Any]:  # type: ignore[override]
        if self.training and self.note:
            RECORD.append(("position", step.step, step.epoch, step.total_steps, step.rank, step.world_size))
        answer = super().training_step(batch)
        return {**answer, "loss": answer["loss"] * (step.step / step.total_steps)}


class Predictions(Net):
    """Returns the prediction of each sample and its number as rows, and records what `summarize` receives.

    Args:
        form: "columns", "tensor" or "list".
    """

    def __init__(self, form: str = "columns", **how: Any) -> None:
        super().__init__(**how)
        self.form = form

    def validation_step(self, batch: Any) -> dict[str, Any]:
        x, y, number = batch
        logits = self(x)
        score = logits.softmax(1)[:, 1].double()
        rows: Any = {
            "columns": {"score": score, "positive": y == 1, "name": [f"sample {one}" for one in number.tolist()]},
            "tensor": torch.stack([number.double(), score], 1),
            "list": [{"number": one, "logits": logits[i]} for i, one in enumerate(number.tolist())],
        }[self.form]
        return {"loss": F.cross_entropy(logits, y, reduction="none"), "rows": rows}

    def summarize(self, totals: dict[str, Any], rows: Any) -> dict[str, float]:
        RECORD.append(("rows", rows))
        if self.form != "columns":
            return {"rows": len(rows)}
        order = rows["score"].argsort(stable=True)  # the area under the curve by ranks (Mann and Whitney 1947)
        positive = rows["positive"][order]
        above = (~positive).long().cumsum(0)[positive].double().sum()
        if len(positive) < 3:
            raise ValueError("AUROC needs more samples.")
        return {"auroc": float(above / (positive.sum() * (~positive).sum()))}
