"""Measures the cost of checkpoints, one every 20 steps, for training a model of 100 million parameters.

    python benchmarks/checkpoint.py         one process, float32, AdamW: 1.2 GB per checkpoint; about six minutes

One process alternates 20 steps without a checkpoint and 20 steps that start with a save, as in the training loop
(`Checkpointer.save`, in the background, with checksums and fsync). A turn ends when its last step is done and its
checkpoint is on the disk. `copy` copies the same tensors into allocated memory; `block` is the time for which `save`
blocks the loop. The first save, which also allocates that memory, is reported separately. The CPU seconds of a save
without training are the computation that it takes from training threads on all cores, also on a shared machine.

Steps and saves share the same two cores here; on a machine with a GPU the cores that write a checkpoint are idle
otherwise.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.figures import Demand, Figures, Report, Spread, spread
from launcher.engine.checkpoint import Checkpointer, training_state

SLOWDOWN = Demand(most=1.05)
BLOCK = Demand(most=1.1)  # of the copy, which it consists of
LAYERS = 8


def main() -> None:
    parser = harness.parser(__doc__, rounds=4)
    parser.add_argument("--parameters", type=float, default=100e6, help="of the model (default 100 million)")
    parser.add_argument("--batch", type=int, default=256, help="samples in a step (default 256)")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints (default 20)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-") as folder:
        training = Training(int(options.parameters), options.batch, Path(folder))
        rounds = list(measure(training, options.rounds, options.every))
    report(options, training, rounds).finish(options.json)


class Training:
    """A multilayer perceptron with real training steps, and its checkpoints."""

    def __init__(self, parameters: int, batch: int, folder: Path) -> None:
        torch.manual_seed(0)
        width = round((parameters / LAYERS) ** 0.5)
        layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.GELU())]
        self.model = nn.Sequential(*layers[:-1])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch = torch.randn(batch, width)
        self.saver = Checkpointer(folder, keep=1)
        self.folder = folder
        self.steps = 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.steps += 1

    def save(self) -> None:
        self.saver.save(self.steps, training_state(self.model, self.optimizer))

    def tensors(self) -> list[Tensor]:
        weights = [parameter.detach() for parameter in self.model.parameters()]
        return weights + [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]


def measure(training: Training, rounds: int, every: int) -> Iterator[Figures]:
    """Yield the figures of every round: seconds, and bytes of a checkpoint."""
    harness.progress("warm-up")
    training.step()
    training.step()
    training.save()  # allocates the memory for copies
    first = training.saver.wait()
    assert first is not None
    copies = [torch.empty_like(tensor).zero_() for tensor in training.tensors()]
    for number in range(rounds):
        harness.progress(f"round {number + 1} of {rounds}")
        began = time.perf_counter()
        for target, source in zip(copies, training.tensors(), strict=True):
            target.copy_(source)
        copy = time.perf_counter() - began
        began, before = time.perf_counter(), time.process_time()
        training.save()
        training.saver.wait()
        alone, cpu = time.perf_counter() - began, time.process_time() - before
        seconds: dict[bool, float] = {}
        for saves in (False, True) if number % 2 == 0 else (True, False):
            training.step()  # the caches still hold data of the previous turn
            began = time.perf_counter()
            if saves:
                training.save()
            for _ in range(every):
                training.step()
            saved = training.saver.wait()
            seconds[saves] = time.perf_counter() - began
        assert saved is not None
        yield {
            "none": seconds[False],
            "checkpoint": seconds[True],
            "copy": copy,
            "alone": alone,
            "cpu": cpu,
            "block": saved.blocked,
            "write": saved.seconds,
            "first_block": first.blocked,
            "bytes": saved.nbytes,
        }


def report(options: Any, training: Training, rounds: list[Figures]) -> Report:
    each = statistics.median(one["none"] for one in rounds) / options.every
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    found = Report(
        "checkpoint",
        {
            "parameters": f"{parameters / 1e6:.1f} million",
            "batch": options.batch,
            "threads": torch.get_num_threads(),
            "a checkpoint every": f"{options.every} steps",
            "bytes of a checkpoint": f"{rounds[0]['bytes'] / 1e9:.2f} GB",
            "rounds": options.rounds,
        },
    )
    slowdown = Spread([one["checkpoint"] / one["none"] for one in rounds])
    block = Spread([one["block"] / one["copy"] for one in rounds])
    found.rows = [
        row("a step without checkpoints, s", f"{each:.3f}"),
        row(f"{options.every} steps and a checkpoint / {options.every} steps", slowdown.text(3), SLOWDOWN, slowdown),
        row("the loop is blocked, s", spread(rounds, "block").text(3)),
        row("the copy alone, s", spread(rounds, "copy").text(3)),
        row("blocked / copy", block.text(2), BLOCK, block),
        row("the first save blocks, s", f"{rounds[0]['first_block']:.3f}"),
        row("from save to durable, s", spread(rounds, "write").text(2)),
        row("the same while nothing trains, s", spread(rounds, "alone").text(2)),
        row("CPU seconds of that", spread(rounds, "cpu").text(2)),
    ]
    found.content = {"rounds": rounds, "slowdown": slowdown.to_dict(), "block": block.to_dict()}
    return found


def row(what: str, value: str, demand: Demand | None = None, of: Any = None) -> dict[str, str]:
    return {"": what, "median (quartiles)": value, "asked": demand.text(of.median) if demand else ""}


if __name__ == "__main__":
    main()
