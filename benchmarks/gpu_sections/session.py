"""Shared by the sections: a device, training on it through the engine, and checks with their verdicts."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.figures import Figures
from benchmarks.gpu_sections.workload import Observer
from launcher.config import CheckpointConfig, Job, LoggingConfig, ScalingConfig, StrategyConfig, TrainerConfig
from launcher.engine import entry
from launcher.engine.runtime import Runtime
from launcher.runs import RunDirectory

WORKLOAD = "benchmarks.gpu_sections.workload"
CONVNET = {"_target_": "models.vision.ConvNet"}
PICTURES = {"_target_": f"{WORKLOAD}.Pictures"}
# Adam divides by the gradient's own size, which turns rounding errors of small gradients into steps of full size.
SGD = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9}
ROUNDING = 1e-5  # relative to the loss, over 20 steps: float32 sums in another order


@dataclass(frozen=True)
class Check:
    """One row of a section's table: measured value and requirement. `passed` None: no requirement."""

    name: str
    found: str
    asked: str
    passed: bool | None

    def to_row(self) -> dict[str, str]:
        verdict = {True: "passed", False: "FAILED", None: ""}[self.passed]
        return {"check": self.name, "found": self.found, "asked": self.asked, "verdict": verdict}


@dataclass
class Section:
    """The result of a section: checks with a verdict, and figures for the JSON file."""

    title: str
    checks: list[Check] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [check.name for check in self.checks if check.passed is False]

    def at_most(self, name: str, value: float, most: float, shown: str = "{:.2g}") -> None:
        """Add a check that `value` is a number of at most `most`."""
        self.checks.append(Check(name, shown.format(value), f"≤ {most:g}", value <= most))

    def holds(self, name: str, found: str, asked: str, passed: bool) -> None:
        self.checks.append(Check(name, found, asked, passed))

    def figure(self, name: str, found: str) -> None:
        self.checks.append(Check(name, found, "", None))

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """Turn an exception in the block into a failed check, so that the checks after it still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()  # with its traceback on standard error, because a GPU may not be available again
            line = str(error).strip().splitlines()
            self.holds(name, f"{type(error).__name__}: {line[0][:120] if line else ''}", "no error", False)


@dataclass
class Trained:
    """One run: its losses by step, what it returned, and the run's own model and optimizer afterwards."""

    directory: Path
    losses: list[float]
    result: dict[str, Any]
    observer: Observer
    seconds: float

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.observer.history[-1]


class Quiet:
    """The engine's control for a run without requests; see `launcher.engine.control.Control`."""

    def requests(self) -> frozenset[str]:
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        """Progress is not shown."""


@dataclass(frozen=True)
class Session:
    """The device of the checks.

    Attributes:
        device: the GPU, or the CPU as a stand-in to test the checks.
        tiny: networks of a few thousand weights and few steps, for the stand-in.
        folder: scratch space of this section.
    """

    device: torch.device
    tiny: bool
    folder: Path

    @property
    def steps(self) -> int:
        """Default data of a run: two epochs, with a smaller last batch in each."""
        return 6 if self.tiny else 20

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def job(
        self,
        *,
        model: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] = SGD,
        strategy: Mapping[str, Any] | None = None,
        callbacks: Mapping[str, Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        device: str | None = None,
        **trainer: Any,
    ) -> Job:
        """Return a job over the classes of `workload` and `models`; the rest is `trainer`."""
        settings: dict[str, Any] = {
            "global_batch_size": 50,
            "log_every": 1,
            "steps": self.steps,
            "evaluate_every": 10**6,
        }
        return Job(
            model=dict(model or CONVNET | ({"width": 4} if self.tiny else {})),
            data=dict(data or PICTURES | {"train": 115 if self.tiny else 515}),
            optimizer=dict(optimizer),
            scheduler={},
            trainer=replace(TrainerConfig(), **(settings | trainer)),
            scaling=ScalingConfig(device=device or self.device.type),
            checkpoint=replace(CheckpointConfig(), **({"every": 10**6} | dict(checkpoint or {}))),
            callbacks={"observer": {"_target_": f"{WORKLOAD}.Observer"}, **(callbacks or {})},
            strategy=StrategyConfig(**dict(strategy or {})),
            logging=replace(LoggingConfig(), tensorboard=False, graph=False),
            trust=[WORKLOAD],
        )

    def train(
        self, job: Job, name: str, runtime: Runtime | None = None, control: Any = None, observed: bool = True
    ) -> Trained:
        """Train `job` in this process, in the folder `name`; a run with checkpoints in the folder is resumed.

        observed: copy the weights after each step, which waits for the device.
        """
        if not observed:
            job = replace(job, callbacks={"observer": {"_target_": f"{WORKLOAD}.Observer", "copies": False}})
        directory = RunDirectory(self.folder / name)
        directory.create()
        directory.clear_requests()
        runtime = runtime or Runtime.single(job.scaling.device)
        began = time.perf_counter()
        task = entry.Task("train", job, str(directory.path), started=time.time())
        result = entry.run(task, runtime, control or Quiet())
        seconds = time.perf_counter() - began
        return Trained(directory.path, losses_of(directory.path), result, Observer.latest, seconds)

    @contextmanager
    def one_rank(self) -> Iterator[Runtime]:
        """Create a process group of this process only, which sharding needs: NCCL on a GPU, else gloo."""
        # A store deletes its file when it is garbage-collected, so two stores of one name would conflict.
        store = self.folder / f"store-{time.monotonic_ns()}"
        dist.init_process_group("nccl" if self.on_gpu else "gloo", init_method=f"file://{store}", rank=0, world_size=1)
        try:
            yield Runtime.adopt(0, 1, 0, 1, self.device.type)
        finally:
            dist.destroy_process_group()


def losses_of(directory: Path) -> list[float]:
    """Return train/loss of every logged step."""
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [entry["train/loss"] for entry in entries if "train/loss" in entry]


def difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference of two curves; infinite if their lengths differ."""
    if len(one) != len(other) or not one:
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True))


def weight_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference of two sets of weights; infinite if their names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


Run = Callable[[Session], Section]
