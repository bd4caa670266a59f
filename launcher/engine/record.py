"""Writes the record of a run on rank 0: sinks, `result.json`, and the events that the driver displays."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import Job, masking
from launcher.engine.control import Control
from launcher.engine.progress import Progress
from launcher.engine.sinks.base import Position, Sink, SinkContext
from launcher.engine.throughput import Throughput
from launcher.formatting import count
from launcher.money import Bill
from launcher.runs import RunDirectory
from launcher.startup_timing import Marks, describe

_PROGRESS_SECONDS = 0.5


class Recorder:
    """Writes the record of a run; exists on rank 0 only.

    Args:
        started: wall-clock time of the user's command.
        marks: the startup phases since then.
        bill: the seconds of the run before this command, and the price of its machines.
        machines: the current number of machines.
        resumed_at: the step that the run continues from, or None for a new run.
        sinks: the sinks, not yet opened.
    """

    def __init__(
        self,
        directory: RunDirectory,
        job: Job,
        control: Control,
        *,
        started: float,
        marks: Marks,
        bill: Bill,
        machines: int,
        total_steps: int,
        steps_per_epoch: int,
        resumed_at: int | None,
        sinks: Sequence[Sink],
    ) -> None:
        self._directory = directory
        self._job = job
        self._control = control
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._resumed_at = resumed_at
        self._began = started
        self._marks = marks
        self._phases: dict[str, float] | None = None
        self._bill = bill
        self.meter = bill.meter(directory.result(), started, machines)
        self.seconds_to_first_step: float | None = None
        self._sinks: list[Sink] = []  # the open sinks
        self._late: list[Sink] = []
        for sink in sinks:
            if sink.opens_late:
                self._late.append(sink)
            else:
                self._open(sink)
        self._steps_done = StepFile(directory.path)
        self._shown = 0.0
        self._ended_well = False
        self._loss: float | None = None

    def first_step(self, drawing: tuple[Any, Any] | None) -> None:
        """Record that the first step is done, and open the sinks that open late.

        Args:
            drawing: the traced network and its arguments, see `drawing.traced_step`.
        """
        now = time.time()
        self.seconds_to_first_step = now - self._began
        self._phases = self._marks.seconds(now)
        if self._job.verbose:
            self._control.emit({"kind": "note", "text": describe(self._phases)})
        for sink in self._late:
            self._open(sink, drawing)
        if self._resumed_at is None:
            yaml = self._directory.config.read_text() if self._directory.config.exists() else ""
            code = "\n".join(f"    {line}" for line in yaml.splitlines())  # an indented block is code in Markdown
            for sink in self._sinks:
                sink.text("configuration", code, 0)

    def _open(self, sink: Sink, drawing: tuple[Any, Any] | None = None) -> None:
        context = SinkContext(self._directory, self._job, self._resumed_at, self._hyperparameters(), drawing)
        sink.open(context)
        self._sinks.append(sink)

    def _hyperparameters(self) -> dict[str, Any]:
        chosen = self._job.logging.hparams
        # A sweep provides the values: the name of a group's option, and the same type in all trials.
        values = chosen if isinstance(chosen, dict) else {key: look_up(self._job, key) for key in chosen}
        return {key: masking.mask_at(key, value) for key, value in values.items()}

    def step(self, progress: Progress, throughput: Throughput) -> None:
        """Record a finished step; display it at most twice a second."""
        self._steps_done.write(progress.step)
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._show(progress, throughput, {})
            self._shown = now

    def log(self, progress: Progress, throughput: Throughput, values: Mapping[str, float]) -> None:
        """Write the tags of this step to all sinks, result.json and the display."""
        at = Position(progress.step, self._epochs(progress), progress.samples, time.time())
        for sink in self._sinks:
            sink.scalars(at, values)
        self._loss = values.get("train/loss", self._loss)
        self._show(progress, throughput, values)
        self.result(progress, throughput, status="running")

    def money_is_spent(self) -> bool:
        """Return whether the budget is spent; print a note once when most of it is spent. Called every step: no I/O."""
        if (warning := self.meter.warning()) is not None:
            self._control.emit({"kind": "note", "text": warning})
        return self.meter.is_over

    def figures(self, values: Mapping[str, Any], step: int) -> None:
        """Write examples to the sinks. Raises ValueError if a sink does not support the type of an example."""
        for sink in self._sinks:
            sink.figures(values, step)

    def _epochs(self, progress: Progress) -> float:
        return progress.epoch + progress.batch / self._steps_per_epoch

    def _show(self, progress: Progress, throughput: Throughput, values: Mapping[str, float]) -> None:
        rate = throughput.latest
        left = (self._total_steps - progress.step) * self._job.trainer.global_batch_size
        self._control.emit(
            {
                "kind": "progress",
                "step": progress.step,
                "total_steps": self._total_steps,
                "epoch": round(self._epochs(progress), 3),
                "loss": self._loss,
                "samples_per_second": rate,
                "seconds_left": left / rate if rate else None,
                "values": dict(values),
            }
        )

    def result(
        self,
        progress: Progress,
        throughput: Throughput,
        *,
        status: str,
        reason: str | None = None,
        checkpoint: Path | None = None,
    ) -> dict[str, Any]:
        """Write result.json and return it."""
        now = time.time()
        usd = self.meter.usd(now)
        changes: dict[str, Any] = {
            "status": status,
            "reason": reason,
            "error": None,
            "steps": progress.step,
            "epochs": round(self._epochs(progress), 6),
            "samples": progress.samples,
            "workers": progress.world_sizes[-1] if progress.world_sizes else None,
            "world_sizes": progress.world_sizes,
            "restarts": progress.restarts,
            "preemptions": progress.preemptions,
            "lost_steps": progress.lost_steps,
            "seconds": round(self._bill.seconds + now - self._began, 3),
            "seconds_to_first_step": self.seconds_to_first_step,
            "phases": self._phases,
            "samples_per_second": throughput.median,
            "cost_usd": None if usd is None else round(usd, 6),
            "metrics": {tag: value if math.isfinite(value) else None for tag, value in progress.metrics.items()},
            "best": None
            if progress.best_value is None
            else {"tag": self._job.checkpoint.monitor, "value": progress.best_value, "step": progress.best_step},
        }
        if checkpoint is not None:
            changes["checkpoint"] = self._directory.display_path(checkpoint)
        self._ended_well = status != "running"
        if self._ended_well:  # before result.json has that status, because `launch logs` then stops reading
            self._control.emit({"kind": "log", "text": f"{status} after {count(progress.step, 'step')}"})
        return self._directory.update_result(**changes)

    def close(self) -> None:
        self._steps_done.close()
        for sink in self._sinks:
            sink.close(self._ended_well)


class StepFile:
    """A file with the number of the last step done, by which a killed run counts the steps that it lost.

    It is rewritten after every step. A write of 20 bytes to the page cache takes about a microsecond, and persists when
    the process is killed.
    """

    def __init__(self, directory: Path) -> None:
        self._file = os.open(directory / ".step", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def read(self) -> int:
        digits = os.pread(self._file, 20, 0)
        return int(digits) if digits.isdigit() else 0

    def write(self, step: int) -> None:
        os.pwrite(self._file, b"%020d" % step, 0)

    def close(self) -> None:
        os.close(self._file)


def look_up(job: Job, key: str) -> Any:
    """Return the value of a dotted configuration key."""
    value: Any = job
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value
