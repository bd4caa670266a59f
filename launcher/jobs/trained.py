"""Evaluates, predicts with and exports a trained run, with its own configuration and the overrides of the command.

Another model is rejected, since the weights would not fit. Other data are allowed: `evaluate` first checks on a few
samples that the network accepts them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import runs
from launcher.clusters import base
from launcher.config import Composition
from launcher.engine.entry import Task
from launcher.engine.rows_file import check_target
from launcher.engine.start_check import check_fit
from launcher.errors import StorageError
from launcher.jobs import ranks
from launcher.jobs.prepare import (
    Request,
    check_same_model,
    compose_stored,
    over_the_run,
    root_of,
    run_section,
    same_section,
)
from launcher.jobs.remote.location import is_remote
from launcher.jobs.training import Observer, device_of, ended_by_signals, over_text, run_task
from launcher.jobs.weights import best_checkpoint
from launcher.planning.plan import machines_of
from launcher.runners import in_process
from launcher.runs import RunDirectory
from launcher.runs.mirror import written
from launcher.runs.plain_files import open_file


@dataclass(frozen=True)
class Trained:
    """A trained run, its configuration with the overrides of the command, and the checkpoint to use."""

    run: RunDirectory
    composition: Composition
    checkpoint: Path
    other_data: bool

    def task(self, action: Any, request: Request, alone: bool = False, **more: Any) -> Task:
        """Return the task for the workers.

        Args:
            alone: use this process, whatever cluster the run was trained on. Runs of remote clusters always do.
        """
        job = self.composition.job
        if alone or is_remote(job.cluster):
            job = replace(job, cluster=base.in_process().config(), scaling=replace(job.scaling, workers="auto"))
        return Task(
            action=action,
            job=job,
            directory=self.run.display_path(),
            python_path=[str(request.calling)],
            started=request.started,
            weights=self.run.display_path(self.checkpoint),
            **more,
        )


def find(name: str, request: Request, observer: Observer, doing: str) -> Trained:
    """Return the run `name` with its best checkpoint.

    Raises:
        RunError: there is no such run, it has no checkpoint, or the overrides name another model.
        ConfigError, TrustError: the overrides or the stored configuration are wrong.
    """
    run = runs.find(root_of(run_section(request).root), name)
    composition, changes = over_the_run(request, run)
    other_data = False
    if changes:
        stored = compose_stored(request, [], run).job
        check_same_model(stored, composition.job, name)
        other_data = not same_section(stored.data, composition.job.data)
        observer.event({"kind": "note", "text": over_text(changes)})
    checkpoint = best_checkpoint(run)
    observer.event({"kind": "note", "text": doing + " " + run.display_path(checkpoint)})
    return Trained(run, composition, checkpoint, other_data)


def evaluate(name: str, request: Request, observer: Observer, rows: str | None = None) -> dict[str, float]:
    """Evaluate a run's best checkpoint on its validation and test sets, each sample once, and return metrics by tag.

    The metrics are appended to the run's `evaluations.jsonl`, with the time, the step and the overrides.

    Args:
        rows: path of a Parquet file for the rows that the model returns for each sample, or None.

    Raises:
        RequestError: see `find`, or the network does not accept other data.
        TrainingError: the evaluation started and failed.
        Stopped: a signal ended it.
    """
    path = None
    if rows is not None:
        path = str((request.calling / rows).absolute())
        check_target(Path(path))
    facts = ranks.in_environment()
    with ended_by_signals():
        if facts is None:
            trained = find(name, request, observer, "Evaluating")
            _check_data(trained, observer)
            task = trained.task("evaluate", request, rows=path)
            metrics = run_task(task, machines_of(task.job), observer.event)[0]
            _append(trained, metrics, observer)
            return metrics
        with ranks.joined(facts, device_of(request)) as runtime:
            trained = find(name, request, observer if runtime.is_first else Observer(), "Evaluating")
            _check_data(trained, observer)
            with in_process.DirectControl(observer.event, shared=True) as control:
                metrics = in_process.run(trained.task("evaluate", request, rows=path), runtime, control)
            if runtime.is_first:
                _append(trained, metrics, observer)
            return metrics


def predict(name: str, request: Request, path: str, observer: Observer, take: Callable[[dict[str, Any]], None]) -> None:
    """Call `take` with the prediction of a run's best checkpoint for each input at `path`, in order.

    Raises:
        RequestError: see `find`; the data or the model does not support predictions, or an input is missing, damaged or
            of the wrong kind.
        UserCodeError: `predict_step` failed.
    """
    with ended_by_signals():
        task = find(name, request, observer, "Predicting with").task("predict", request, alone=True, inputs=path)

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "prediction":
                take(event["value"])
            else:
                observer.event(event)

        run_task(task, machines_of(task.job), on_event)


def export(name: str, request: Request, observer: Observer, begun: Callable[[Path], None]) -> Path:
    """Write a run's best weights and its network to its folder `export`, and return the folder.

    Args:
        begun: called with the folder before the export starts. After that, a failure leaves the weights in it.

    Raises:
        RequestError: see `find`.
        ExportError: the network cannot be exported; its weights are written.
    """
    with ended_by_signals():
        trained = find(name, request, observer, "Exporting")
        task = trained.task("export", request, alone=True)
        # The exported program runs on every device; the CPU is available on every machine.
        task.job = replace(task.job, scaling=replace(task.job.scaling, device="cpu"))
        folder = trained.run.path / "export"
        with written(trained.run):
            begun(folder)
            run_task(task, machines_of(task.job), observer.event)
        return folder


def _check_data(trained: Trained, observer: Observer) -> None:
    """Raise ConfigError if the overrides name other data, and the network does not accept them."""
    if not trained.other_data:
        return
    observer.event({"kind": "phase", "name": "check"})
    check_fit(trained.composition.job, trained.run.name)


def _append(trained: Trained, metrics: dict[str, float], observer: Observer) -> None:
    entry = {
        "time": time.time(),
        "step": int(trained.checkpoint.name.rpartition("-")[2]),
        "words": trained.composition.masked_words(),
        **{tag: value if value == value and abs(value) != float("inf") else None for tag, value in metrics.items()},
    }
    try:
        with written(trained.run), open_file(trained.run.path / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
    except (OSError, StorageError) as error:  # the run may belong to another user
        why = str(getattr(error, "strerror", None) or error).rstrip(".")
        observer.event({"kind": "note", "text": f"The metrics were not written to evaluations.jsonl: {why}."})
