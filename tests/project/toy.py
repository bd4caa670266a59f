"""A user's model and data, which import nothing of launch, with all failures that the tests inject."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class Points(Dataset):
    """y = 3 x + 1 at points x between -1 and 1; row `bad` cannot be read."""

    def __init__(self, samples: int, bad: int | None, speak: bool) -> None:
        self.x = torch.linspace(-1, 1, samples).unsqueeze(1)
        self.bad, self.speak = bad, speak

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.bad:
            raise ValueError(f"numbers.csv, row {index}: not a number")
        if self.speak:
            print(f"row {index} is read")
        return self.x[index], 3 * self.x[index] + 1


class Pairs(Dataset):
    """Points with two coordinates, which a line does not take; label 10 of them is odd."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(2), torch.ones(1)


class TwoNumbers:
    """Data of another kind."""

    def __init__(self) -> None:
        self.train = self.val = Pairs()


class Given(Dataset):
    """Numbers to be put into the line, called by their rows."""

    def __init__(self, path: str, rows: list[str]) -> None:
        self.path, self.rows = path, rows
        self.names = [f"row {number}" for number in range(1, len(rows) + 1)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return torch.tensor([float(self.rows[index])])
        except ValueError:
            message = f"{self.path}, row {index + 1}: expected a number, found {self.rows[index]!r}"
            raise ValueError(message) from None


class Numbers:
    """The data of the tests."""

    def __init__(
        self, samples: int = 40, bad: int | None = None, speak: bool = False, num_workers: int = 0, seconds: float = 0.0
    ) -> None:
        time.sleep(seconds)
        self.num_workers = num_workers
        self.train, self.val = Points(samples, bad, speak), Points(10, None, False)

    def inputs(self, path: str) -> Given:
        with open(path) as file:
            return Given(path, file.read().splitlines())


class Calls:
    """Counts training steps in a place that is not restored after the model was tried out, once before its first step.

    The start check tries another object of the same class, with three batches.
    """

    steps = -1


class Line(nn.Module):
    """A straight line.

    Args:
        width: more than one makes it another model.
        delay: seconds that a training step takes.
        failure: what happens at training step `at`, 0 being the first that tries the model out: "raise", "infinite",
            "die", "pdb", "prompt", "raw" (what does not pass through sys.stdout).
        rank: the failure happens to this rank alone.
        secret_key: for the record of a run.
        predicts: what `predict_step` gives for an input: "number", "mapping", "few", "object"; "raise", "unfit".
        traceable: whether `forward` can be exported.
    """

    def __init__(
        self,
        width: int = 1,
        delay: float = 0.0,
        failure: str | None = None,
        at: int = 1,
        rank: int | None = None,
        secret_key: str | None = None,
        speak: bool = False,
        predicts: str = "number",
        traceable: bool = True,
    ) -> None:
        super().__init__()
        self.predicts, self.traceable = predicts, traceable
        self.net = nn.Linear(1, 1) if width == 1 else nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))
        self.delay, self.failure, self.at, self.rank, self.speak = delay, failure, at, rank, speak
        self.calls = Calls()
        if speak:
            print("a line is built")

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and float(x.sum()) > 0:
            return x
        return self.net(x)

    def predict_step(self, x: Tensor) -> list[Any]:
        y = self(x)[:, 0]
        if self.predicts == "unfit":
            raise ValueError(f"a line takes one number, not {len(x)} of them")
        kinds: dict[str, Callable[[], list[Any]]] = {
            "number": lambda: list(y),
            "mapping": lambda: [{"y": one, "sure": float("nan"), "more": (1, "a", None)} for one in y],
            "few": lambda: [1.0],
            "object": lambda: [object() for _ in y],
            "raise": lambda: [kinds["label"]() for _ in y],
        }
        return kinds[self.predicts]()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, y = batch
        loss = F.mse_loss(self.net(x), y, reduction="none").mean(1)
        if not self.training:
            return {"loss": loss}
        self.calls.steps += 1
        if self.calls.steps > 0 and len(batch[0]) > 4:  # the start check tries batches of four samples at most
            time.sleep(self.delay)
        if self.speak:
            print(f"step {self.calls.steps} of the model")
        own = self.rank is None or self.rank == (dist.get_rank() if dist.is_initialized() else 0)
        if self.failure is not None and self.calls.steps == self.at and own:
            if self.failure == "infinite":
                loss = loss * float("inf")
            else:
                failures: dict[str, Callable[[], Any]] = {
                    "raise": self.stumble,
                    "die": lambda: os._exit(9),
                    "pdb": breakpoint,
                    "prompt": lambda: print("answer:", input("a question? ")),
                    "raw": lambda: os.system("echo a child speaks") or os.write(1, b"raw bytes\n"),
                }
                failures[self.failure]()
        return {"loss": loss}

    def stumble(self) -> None:
        raise KeyError("the user's own mistake")


class Accidents:
    """Signals that ranks send themselves after a step, each once in a run's life: `{rank: 1, step: 6, name: KILL}`."""

    def __init__(self, happen: list[dict[str, Any]]) -> None:
        self.happen = happen

    def on_step(self, run: Any) -> None:
        for number, accident in enumerate(self.happen):
            mark = run.directory / f"accident-{number}"
            if (run.rank, run.step) == (accident["rank"], accident["step"]) and not mark.exists():
                mark.write_text(f"{os.getpid()} {time.time()}")
                os.kill(os.getpid(), getattr(signal, f"SIG{accident['name']}"))
