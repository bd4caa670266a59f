"""The entry point of the engine: every rank calls `run`, in this process, under torchrun or in a Ray Train worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launcher.config import Job, masking, targets
from launcher.engine import checkpoint, hardware, inference
from launcher.engine.build import (
    build_data,
    build_evaluator,
    build_model,
    build_order,
    build_strategy,
    caveats,
    check_batch,
)
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.console import Console
from launcher.engine.control import Control, Heartbeat
from launcher.engine.failures import translate
from launcher.engine.progress import Progress
from launcher.engine.rows_file import write_rows
from launcher.engine.runtime import Runtime
from launcher.engine.shared_storage import Outputs, open_outputs
from launcher.engine.steps import takes_step
from launcher.engine.trainer import Trainer
from launcher.engine.weights import load_weights_into, on_this_machine
from launcher.errors import ConfigError, RequestError
from launcher.formatting import step_line
from launcher.money import Bill, Rate
from launcher.runs import RunDirectory
from launcher.runs.mirror import local
from launcher.startup_timing import Marks


@dataclass
class Task:
    """The complete description of the work of a run, as plain data that is sent to the workers.

    Args:
        action: `train`, or the action that uses `weights`.
        directory: the run's directory as an absolute path, or its URI on an object store.
        python_path: directories from which the configuration may import modules (the calling directory).
        started: wall-clock time of the user's command.
        marks: the startup phases so far.
        weights: path of a checkpoint or weights file to start from (`checkpoint.load`), evaluate, predict with or
            export.
        inputs: path of the inputs of `predict`.
        rows: path of the Parquet file for the rows of `evaluate`, or None.
        bill: the seconds of the run before this command, and the price of its machines.
        notes: the notes of the start check, one line each.
    """

    action: Literal["train", "evaluate", "predict", "export"]
    job: Job
    directory: str
    python_path: list[str] = field(default_factory=list)
    started: float = 0.0
    weights: str | None = None
    marks: Marks = field(default_factory=Marks)
    inputs: str | None = None
    rows: str | None = None
    bill: Bill = field(default_factory=Bill)
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Task:
        """Rebuild a task from the result of `dataclasses.asdict`."""
        bill, rate = state["bill"], state["bill"]["rate"]
        parts = {
            "job": Job.from_dict(state["job"]),
            "marks": Marks(**state["marks"]),
            "bill": Bill(**{**bill, "rate": None if rate is None else Rate(**rate)}),
        }
        return cls(**{**state, **parts})


def run(task: Task, runtime: Runtime, control: Control) -> dict[str, Any]:
    """Execute the task on one rank.

    Returns:
        On rank 0: for `train` the content of result.json, for `evaluate` the metrics by tag. Otherwise empty.

    Raises:
        LaunchError: any exception, translated by `failures.translate`; `exit_status` is 1 after training has started.
    """
    task = _on_this_machine(task)
    masking.remember(masking.secrets_in(asdict(task.job)))
    directory = RunDirectory(Path(task.directory))
    phase = _Phase(control, task.marks)
    trains = task.action == "train"
    shared = open_outputs(directory, runtime, phase) if trains else nullcontext(Outputs(directory.log, None))
    result: dict[str, Any] = {}
    # The log is closed before `open_outputs` ends, which uploads the last lines.
    with _translated(phase, runtime.rank), shared as outputs, Console(outputs.log, runtime.rank, phase) as console:
        phase.note = console.note
        with _translated(phase, runtime.rank):
            result = _act(task, runtime, phase, directory, outputs.uploads)
    return result


@contextmanager
def _translated(phase: _Phase, rank: int) -> Iterator[None]:
    """Translate an exception inside to a LaunchError, and write it to the log if that is open."""
    try:
        yield
    except Exception as error:
        translated = translate(error, rank)
        if phase.training and isinstance(translated, RequestError):
            translated.exit_status = 1
        if phase.note is not None:
            phase.note(f"{type(translated).__name__}: {translated}")
        if translated is error:
            raise
        raise translated from error


def _act(
    task: Task, runtime: Runtime, control: Control, directory: RunDirectory, uploads: Uploads | None
) -> dict[str, Any]:
    for path in task.python_path:
        targets.add_calling_directory(path)
    hardware.configure(runtime, task.job.scaling.cpus_per_worker, task.job.trainer.deterministic)
    if task.job.trainer.compile:
        hardware.keep_compiled(directory.path.parent)
    if task.action == "train":
        # Compiling a large network may take longer than the heartbeat's timeout, so the heartbeat starts here.
        with Heartbeat(directory) if runtime.is_first else nullcontext():
            trainer = _build_trainer(task, runtime, control, directory, uploads)
        return trainer.fit()
    actions = {"evaluate": _evaluate, "predict": _predict, "export": _export}
    return actions[task.action](task, runtime, control, directory)


def _on_this_machine(task: Task) -> Task:
    """Return the task with local paths instead of URIs of an object store."""
    task = replace(task, directory=str(local(task.directory)))
    return replace(task, weights=on_this_machine(task.weights))


class _Phase:
    """Wraps the runner's control: records whether training has started, and copies the displayed notes to log.txt."""

    def __init__(self, control: Control, marks: Marks) -> None:
        self._control = control
        self._marks = marks
        self.training = False
        self.note: Callable[[str], None] | None = None

    def requests(self) -> frozenset[str]:
        return self._control.requests()

    def emit(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "log":
            if self.note is not None:
                self.note(event["text"])
            return
        if kind == "phase":
            self._marks.begin("first_step" if event["name"] == "training" else event["name"])
        self.training = self.training or (kind == "phase" and event["name"] == "training")
        if self.note is not None and kind == "note":
            self.note(event["text"])
        elif self.note is not None and kind == "progress" and event["values"]:
            self.note(step_line(event))
        self._control.emit(event)


def _build_trainer(
    task: Task, runtime: Runtime, control: Control, directory: RunDirectory, uploads: Uploads | None
) -> Trainer:
    job = task.job
    control.emit({"kind": "phase", "name": "data"})
    data = build_data(job)
    check_batch(job, len(data.train), runtime.world_size)
    control.emit({"kind": "phase", "name": "model"})
    model = build_model(job, runtime)
    if runtime.is_first:
        for line in (*caveats(model), *task.notes):
            control.emit({"kind": "note", "text": line})
    trainer = Trainer(job, runtime, control, directory, data, model, task.started, task.marks, uploads, task.bill)
    if task.weights:
        weights = checkpoint.load_weights(task.weights)  # a resumed run replaces them with its checkpoint
        remarks = load_weights_into(trainer.strategy.model, weights, task.weights, job.checkpoint.load_strict)
        if remarks and runtime.is_first:
            control.emit({"kind": "note", "text": f"Weights of {task.weights}: {remarks}."})
    return trainer


def _evaluate(task: Task, runtime: Runtime, control: Control, directory: RunDirectory) -> dict[str, Any]:
    job = task.job
    if task.weights is None:
        raise ConfigError("There are no weights to evaluate. Name a run with a checkpoint.")
    data, model = inference.load_trained(job, runtime, task.weights)
    strategy = build_strategy(job, model, runtime)
    if takes_step(model) and Path(task.weights).is_dir():
        order = build_order(job, data)
        total_steps = job.trainer.steps or job.trainer.epochs * order.steps_per_epoch
        progress = checkpoint.inspect(task.weights).state["progress"]
        strategy.stand_at(Progress.of(progress), total_steps)
    metrics: dict[str, float] = {}
    kept: list[tuple[str, Any]] = []
    for tag in ("val", "test"):
        evaluator = build_evaluator(job, strategy, runtime, data, tag, directory.path)
        if evaluator is not None:
            evaluator.take_rows = None if task.rows is None else lambda prefix, rows: kept.append((prefix[:-1], rows))
            metrics.update(evaluator.run())
    if task.rows is not None and runtime.is_first:
        if not kept:
            raise ConfigError(
                f"rows={task.rows} needs a validation_step that returns `rows`, one entry per sample (see "
                "docs/extending.md).",
                key="rows",
            )
        write_rows(Path(task.rows), kept)
    return metrics if runtime.is_first else {}


def _predict(task: Task, runtime: Runtime, control: Control, directory: RunDirectory) -> dict[str, Any]:
    assert task.weights is not None
    assert task.inputs is not None
    inference.predict(task.job, runtime, control, task.weights, task.inputs)
    return {}


def _export(task: Task, runtime: Runtime, control: Control, directory: RunDirectory) -> dict[str, Any]:
    assert task.weights is not None
    inference.export(task.job, runtime, control, task.weights, directory.path / "export")
    return {}
