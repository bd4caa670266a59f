"""From the words of a command to a finished run: compose, plan, prepare the directory, run, record.

The command line and the Python API are both thin shells around `train` and `evaluate`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import provenance, runs
from launcher.config import Composition, Job, compose, default_run_name
from launcher.errors import ConfigError, LaunchError, RequestError, RunError, Stopped, did_you_mean
from launcher.plan import Machines, Plan, machines_of, make_plan
from launcher.runs import RunDirectory

if TYPE_CHECKING:
    from launcher.engine.entry import Task
    from launcher.engine.runtime import Runtime

Event = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        words: Hydra overrides.
        config_dir: a directory of the user's own configuration, or None.
        calling: the directory where the command was given; its modules may be named in the configuration.
        started: wall-clock time of the command.
    """

    words: Sequence[str]
    config_dir: Path | None = None
    calling: Path = field(default_factory=Path.cwd)
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start, or one with nothing left to do (`finished`)."""

    composition: Composition
    directory: RunDirectory
    resumes: bool = False
    finished: bool = False

    @property
    def job(self) -> Job:
        return self.composition.job


# ---- which run ------------------------------------------------------------------------------------------------------


def prepare(request: Request) -> Prepared:
    """Compose the job and decide on its run. Nothing is written.

    Raises:
        ConfigError, TrustError: the words or the configuration are wrong.
        RunError: the run exists already, does not exist, is running, or cannot be continued with these words.
    """
    run = compose([word for word in request.words if _key(word).startswith("run.")], request.config_dir).job.run
    words = list(request.words)
    if run.resume is not False and run.name is not None:
        directory = RunDirectory(_root(run.root) / run.name)
        if directory.exists():
            return _continue(request, words, directory)
        if run.resume is True:
            runs.find(run.root, run.name)  # raises, and names the nearest
    stored = None
    if run.like is not None:
        stored = _like(run.root, run.like).config
        words = [word for word in words if _key(word) != "run.like"]
    composition = compose(words, request.config_dir, stored)
    name = composition.job.run.name or default_run_name(
        composition.choices if stored is None else {"experiment": str(run.like).replace("/", "-")}, datetime.now()
    )
    directory = RunDirectory(_root(composition.job.run.root) / name)
    if composition.job.run.name is None:
        directory = _unused(directory)
    elif directory.exists():
        raise RunError(
            f'The run "{name}" exists already in {directory.path.parent}. Continue it with run.resume=true, or choose another '
            "run.name."
        )
    return Prepared(composition, directory)


def _continue(request: Request, words: list[str], directory: RunDirectory) -> Prepared:
    if directory.status() == "running":
        raise RunError(
            f'The run "{directory.name}" is running. Follow it with: launch logs {directory.name}; '
            f"stop it with: launch stop {directory.name}."
        )
    if not directory.config.is_file():
        raise RunError(f"{directory.config} is missing; the run cannot be continued. Start a new one under another run.name.")
    ours = [word for word in words if _key(word) not in ("run.name", "run.resume", "run.root")]
    composition = compose(ours, request.config_dir, directory.config)
    if ours:
        _check_continuation(compose([], request.config_dir, directory.config).job, composition.job, directory.name)
    job = composition.job
    job.run.name = directory.name
    job.run.root = str(directory.path.parent)
    result = directory.result()
    longer = any(_key(word) in ("trainer.epochs", "trainer.steps") for word in ours)
    finished = result.get("status") == "completed" and not longer
    return Prepared(composition, directory, resumes=True, finished=finished)


# What a checkpoint is bound to: changing it would not continue the run but start another.
_BOUND = ("model", "data", "optimizer", "scheduler", "strategy")
_BOUND_KEYS = ("seed", "global_batch_size", "overfit_batches", "deterministic", "precision")


def _check_continuation(old: Job, new: Job, name: str) -> None:
    """Raise RunError where the words would break the saved state."""
    changed = [section for section in _BOUND if _identity(getattr(old, section)) != _identity(getattr(new, section))]
    changed += [f"trainer.{key}" for key in _BOUND_KEYS if getattr(old.trainer, key) != getattr(new.trainer, key)]
    if changed:
        raise RunError(
            f'The run "{name}" cannot be continued with another {", ".join(changed)}: its checkpoints belong to what it was '
            f"started with. Leave the word out, or start a new run from its configuration with run.like={name}."
        )


def _identity(section: Any) -> Any:
    """What must stay: not the number of loader processes, nor the learning rate, which may be mended on the way."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("num_workers", "lr")}


def _like(root: str, name: str) -> RunDirectory:
    if name.rpartition("/")[2] == "best":
        raise RunError(f'run.like={name}: "{name}" is no sweep. Give the name of a run.')
    found = runs.find(root, name)
    if not found.config.is_file():
        raise RunError(f"{found.config} is missing; run.like={name} needs it.")
    return found


def _root(root: str) -> Path:
    if "://" in root:
        raise ConfigError(f"run.root={root}: a run root is a local directory in this version. Use a path.")
    return Path(root).expanduser().absolute()


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _unused(directory: RunDirectory) -> RunDirectory:
    """Return the directory, with a number behind its name when another run began in the same second."""
    number = 1
    candidate = directory
    while candidate.path.exists():
        number += 1
        candidate = RunDirectory(directory.path.with_name(f"{directory.name}-{number}"))
    return candidate


# ---- training -------------------------------------------------------------------------------------------------------


class Observer:
    """What the caller wants to hear of a run. The command line shows it; the Python API may ignore it."""

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        """The run is known, and what it will do."""

    def event(self, event: Event) -> None:
        """An event of the run; see `engine.control.Control.emit`."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: result.json's content, its directory, and the signal that stopped it, if one did."""

    result: dict[str, Any]
    directory: RunDirectory
    signal_number: int | None = None


def train(request: Request, observer: Observer) -> Outcome:
    """Run one job to its end.

    Raises:
        RequestError: it cannot be done as asked; nothing was started.
        TrainingError: it started and failed; result.json says so.
        Stopped: it was ended at once by a signal.
    """
    ranks = _ranks()
    if ranks is not None:
        return _train_as_rank(request, observer, ranks)
    prepared = prepare(request)
    if prepared.finished:
        observer.prepared(prepared, None)
        return Outcome(prepared.directory.result(), prepared.directory)
    plan = make_plan(prepared.job)
    task = _begin(request, prepared)
    observer.prepared(prepared, plan)
    with _Recorded(prepared):
        result, signal_number = run_task(task, plan.machines, observer.event)
    return Outcome(result, prepared.directory, signal_number)


def run_task(task: Task, machines: Machines, on_event: Callable[[Event], None]) -> tuple[dict[str, Any], int | None]:
    """Run the task where the plan puts it. Returns rank 0's result, and the signal that came meanwhile."""
    if machines.cluster == "none":
        from launcher.engine.runtime import Runtime
        from launcher.runners import in_process

        with in_process.DirectControl(on_event) as control:
            return in_process.run(task, Runtime.single(task.job.scaling.device), control), control.signal_number
    from launcher.clusters.local import EmbeddedRay
    from launcher.runners.signals import Interrupts

    on_event({"kind": "phase", "name": "ray"})
    with (
        Interrupts() as interrupts,
        EmbeddedRay(verbose=task.job.verbose, preload=("launcher.runners.ray_train",)) as cluster,
    ):
        from launcher.runners import ray_train

        on_event({"kind": "phase", "name": "workers"})
        result = ray_train.run(
            task,
            workers=machines.workers,
            cpus_per_worker=machines.cpus_per_worker,
            gpus_per_worker=machines.gpus_per_worker,
            cluster=cluster,
            on_event=on_event,
            interrupts=interrupts,
        )
        return result, interrupts.signal_number


def _begin(request: Request, prepared: Prepared) -> Task:
    """Write the run's directory and return the task."""
    from launcher.engine.entry import Task

    directory, composition = prepared.directory, prepared.composition
    weights = None if prepared.resumes else _weights_of(prepared.job)
    directory.create()
    directory.clear_requests()
    directory.config.write_text(composition.to_yaml(directory.name))
    _write_words(directory, composition.shown_words(), append=prepared.resumes)
    (directory.path / "code.patch").write_text(provenance.patch(request.calling))
    facts = {"user": provenance.user(), "versions": provenance.versions(), "git": provenance.git(request.calling)}
    if prepared.resumes:
        directory.update_result(status="running", reason=None, error=None, **facts)
    else:
        directory.write_result({**_EMPTY_RESULT, "status": "running", **facts})
    directory.beat()
    return Task(
        action="train",
        job=replace(prepared.job, run=replace(prepared.job.run, name=directory.name)),
        directory=str(directory.path),
        python_path=[str(request.calling)],
        started=request.started,
        weights=weights,
    )


_EMPTY_RESULT: dict[str, Any] = {
    "status": "running",
    "reason": None,
    "error": None,
    "steps": 0,
    "epochs": 0.0,
    "samples": 0,
    "workers": None,
    "world_sizes": [],
    "restarts": 0,
    "lost_steps": 0,
    "seconds": 0.0,
    "seconds_to_first_step": None,
    "samples_per_second": None,
    "cost_usd": None,
    "checkpoint": None,
    "metrics": {},
    "best": None,
}


def _write_words(directory: RunDirectory, words: Sequence[str], append: bool) -> None:
    """Write overrides.yaml: a list of words; what a resume added follows the words that started the run."""
    file = directory.path / "overrides.yaml"
    lines = "".join(f"- {json.dumps(word)}\n" for word in words)
    before = file.read_text() if append and file.exists() else ""
    file.write_text((before if before.strip() != "[]" else "") + lines or "[]\n")


def _weights_of(job: Job) -> str | None:
    """Return the path of the weights that `checkpoint.load` names: a run's best checkpoint, or a file."""
    source = job.checkpoint.load
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.is_file() or (path / "state.json").is_file():
        return str(path.absolute())
    run = RunDirectory(_root(job.run.root) / source)
    if run.exists():
        return str(best_checkpoint(run))
    known = [other.name for other in runs.list_runs(job.run.root)]
    raise RunError(
        f"checkpoint.load={source}: there is no such run in {_root(job.run.root)} and no such file.{did_you_mean(source, known)}"
    )


def best_checkpoint(run: RunDirectory) -> Path:
    """Return the checkpoint with the best monitored value, or the newest intact one where none is monitored.

    Raises:
        RunError: the run has none.
    """
    from launcher.engine.checkpoint import available, newest_intact, verify

    best = run.result().get("best") or {}
    path = available(run.checkpoints).get(best.get("step", -1))
    if path is not None:
        verify(path)
        return path
    newest = newest_intact(run.checkpoints)
    if newest.path is None:
        raise RunError(f'The run "{run.name}" has no checkpoint that can be used. {newest.explain()}'.strip())
    return newest.path


class _Recorded:
    """Sees to it that result.json says how the run ended, whatever ended it."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        directory = self._prepared.directory
        if error is None:
            return
        if isinstance(error, RequestError) and error.exit_status == 2 and not self._prepared.resumes:
            # Told before anything was trained: the name stays free for the next try.
            shutil.rmtree(directory.path, ignore_errors=True)
            return
        if isinstance(error, Stopped):
            directory.update_result(status="stopped", reason="signal", error=None)
            return
        directory.update_result(status="failed", reason=None, error=f"{type(error).__name__}: {error}")


# ---- torchrun and srun ----------------------------------------------------------------------------------------------


def _ranks() -> tuple[int, int, int, int] | None:
    if not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return None  # the usual case needs no torch to know it
    from launcher.engine.runtime import ranks_in_environment

    return ranks_in_environment()


def _train_as_rank(
    request: Request, observer: Observer, ranks: tuple[int, int, int, int]
) -> Outcome:
    """Train as one of the ranks that torchrun or srun started. Rank 0 prepares the run for all and is the one that talks."""
    from launcher.engine.runtime import Runtime
    from launcher.runners import in_process

    # The device is the job's to choose, so the configuration is composed first, on every rank alike.
    device = compose([w for w in request.words if _key(w) == "scaling.device"], request.config_dir).job.scaling.device
    runtime = Runtime.from_environment(ranks, device)
    try:
        prepared, task = _agree(request, observer, runtime)
        if prepared is not None and prepared.finished:
            return Outcome(prepared.directory.result(), prepared.directory)
        if task is None:
            return Outcome({}, RunDirectory(Path()))
        with (
            in_process.DirectControl(observer.event if prepared else lambda event: None) as control,
            _Recorded(prepared) if prepared else nullcontext(),
        ):
            result = in_process.run(task, runtime, control)
        return Outcome(result, RunDirectory(Path(task.directory)), control.signal_number)
    finally:
        runtime.close()


def _agree(request: Request, observer: Observer, runtime: Runtime) -> tuple[Prepared | None, Task | None]:
    """Return (rank 0's preparation, everybody's task). An error of rank 0 is raised on every rank."""
    prepared, plan, task, failure = None, None, None, None
    if runtime.is_first:
        try:
            prepared = prepare(request)
            if not prepared.finished:
                plan = make_plan(prepared.job, runtime.world_size)
                task = _begin(request, prepared)
            observer.prepared(prepared, plan)
            if prepared.job.scaling.workers not in ("auto", runtime.world_size):
                text = f"scaling.workers={prepared.job.scaling.workers} is ignored: {runtime.world_size} processes were started."
                observer.event({"kind": "note", "text": text})
        except LaunchError as error:
            failure = error
    failure, task = runtime.broadcast((failure, task))
    if failure is not None:
        raise failure
    return prepared, task


# ---- evaluating -----------------------------------------------------------------------------------------------------


def evaluate(name: str, request: Request, observer: Observer) -> dict[str, float]:
    """Evaluate a run's best checkpoint on its validation and test sets, each sample once. Returns metrics by tag.

    Raises:
        RunError: there is no such run, or it has no checkpoint.
        RequestError, TrainingError: as for `train`.
    """
    from launcher.engine.entry import Task

    root = compose([w for w in request.words if _key(w) == "run.root"], request.config_dir).job.run.root
    run = runs.find(root, name)
    words = [w for w in request.words if _key(w) != "run.root"]
    job = compose(words, request.config_dir, run.config).job
    checkpoint = best_checkpoint(run)
    ranks = _ranks()
    task = Task(
        action="evaluate",
        job=job,
        directory=str(run.path),
        python_path=[str(request.calling)],
        started=request.started,
        weights=str(checkpoint),
    )
    if ranks is not None:
        from launcher.engine.runtime import Runtime
        from launcher.runners import in_process

        runtime = Runtime.from_environment(ranks, job.scaling.device)
        try:
            with in_process.DirectControl(observer.event) as control:
                return in_process.run(task, runtime, control)
        finally:
            runtime.close()
    observer.event({"kind": "note", "text": f"Evaluating {checkpoint}"})
    return run_task(task, machines_of(job), observer.event)[0]


def exit_status_of(signal_number: int | None) -> int:
    """Return 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal_number or signal.SIGINT)
