"""Composes a job's configuration and finds its run: a new run, one to resume, or one to imitate (`run.like`).

The module writes nothing; `launcher.jobs.training` and `launcher.jobs.record` use its result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from launcher import runs
from launcher.clusters.base import attached
from launcher.config import Composition, Job, RunConfig, Settings, authority, compose, default_run_name, peek, targets
from launcher.config.checks import check_run
from launcher.config.overrides import masked
from launcher.config.schema import StrategyConfig
from launcher.engine.strategies.kinds.base import identity
from launcher.errors import RequestError, RunError, StorageError
from launcher.runs import RunDirectory, mirror, plain_files, user_state
from launcher.runs.storage import check_uri, disk_path, is_gathered, is_uri, plain_path


@dataclass(frozen=True)
class Request:
    """The user's request for a job.

    Args:
        words: Hydra overrides.
        config_dir: the directory of the user's own configuration, or None.
        calling: the directory in which the command was called; the configuration may name its modules.
        started: wall-clock time of the command.
        on_head: HOST:PORT of a Ray cluster, if this process is a driver on its head for a command on another machine.
        settings: on a head, the cluster section of that command; otherwise the user's settings file is read.
        note: called with a line for each set of keys that is dropped from a configuration.
    """

    words: Sequence[str]
    config_dir: Path | None = None
    calling: Path = field(default_factory=Path.cwd)
    started: float = field(default_factory=time.time)
    on_head: str | None = None
    settings: Settings | None = None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start, or that is complete (`finished`).

    Attributes:
        resumes: the run exists and is continued.
        changes: the overrides that change the configuration of an existing run, with secrets masked.
        like: the run that `run.like` names.
    """

    composition: Composition
    directory: RunDirectory
    resumes: bool = False
    finished: bool = False
    changes: tuple[str, ...] = ()
    like: RunDirectory | None = None

    @property
    def job(self) -> Job:
        return self.composition.job

    def nothing_to_do(self) -> str:
        """Return the reason why a finished run is not continued, and the override that continues it."""
        result, trainer = self.directory.result(), self.job.trainer
        reason, steps, epochs = result.get("reason"), result.get("steps") or 0, result.get("epochs") or 0.0
        name = self.directory.name
        if reason is None:
            return f"{name} is completed, so there is nothing to do. Continue it with a larger trainer.epochs=N."
        total = trainer.steps or (round(trainer.epochs * steps / epochs) if epochs else 0)
        patient = [
            f"callbacks.{callback}.patience"
            for callback, section in self.job.callbacks.items()
            if section and str(section.get("_target_", "")).endswith("EarlyStopping")
        ]
        if reason == "early_stopping" and patient:
            change = f"a larger {' or '.join(patient)}"
        else:
            change = "other settings for the callback that stopped it"
        return (
            f"{name} stopped at {steps} of {total} steps: a callback ended it early ({reason}). A resume with the same "
            f"overrides would do nothing. Continue it with run.resume=true and {change}."
        )


def prepare(request: Request) -> Prepared:
    """Compose the job and find its run.

    Raises:
        ConfigError, TrustError: the overrides or the configuration are wrong.
        RunError: the run exists, does not exist, is running, or cannot be continued with these overrides.
    """
    prepared = _prepared(request)
    at_hand(request, prepared.job)
    return prepared


def at_hand(request: Request, job: Job) -> None:
    """Attach a job to the Ray cluster of this head. config.yaml keeps the user's cluster section."""
    if request.on_head is not None:
        job.cluster = attached(job.cluster, request.on_head)


def _prepared(request: Request) -> Prepared:
    new, resumed, like = _resolve(request)
    if resumed is not None:
        return _resume(request, resumed)
    composition = new or _compose_like(request, like)
    root = root_of(composition.job.run.root)
    name = composition.job.run.name
    if name is None:
        choices = composition.choices if like is None else {"experiment": _name_for_derived(like)}
        return Prepared(composition, unused(RunDirectory(root / default_run_name(choices, datetime.now()))), like=like)
    directory = RunDirectory(root / name)
    if directory.exists():
        raise RunError(
            f'The run "{name}" already exists in {directory.root}. Use run.resume=true to continue it, or choose '
            "another run.name."
        )
    return Prepared(composition, directory, like=like)


def composed(request: Request) -> Composition:
    """Return the configuration that `train` would use, even if the run cannot start; for `--help` and `--cfg`."""
    new, resumed, like = _resolve(request)
    if resumed is not None:
        return over_the_run(request, resumed)[0]
    return new or _compose_like(request, like)


def run_section(request: Request) -> RunConfig:
    """Return the section `run` of the configuration.

    If the overrides do not compose, only those of `run.*` are used: the others may belong to an existing run.
    """
    try:
        run: RunConfig = peek(request.words, request.config_dir, "run")
    except RequestError:
        run = peek([word for word in request.words if key_of(word).startswith("run.")], request.config_dir, "run")
    check_run(run)
    return run


def _resolve(request: Request) -> tuple[Composition | None, RunDirectory | None, RunDirectory | None]:
    """Return (composition of a new run, run to resume, run to imitate). Exactly one of them is not None."""
    targets.add_calling_directory(request.calling)
    new: Composition | None = None
    problem: RequestError | None = None
    try:
        new = compose(request.words, request.config_dir, settings=request.settings)
        run = new.job.run
    except RequestError as error:  # the overrides may be valid for the configuration of the run that they name
        problem = error
        try:
            run = run_section(request)
        except RequestError:
            raise problem from None
    if run.resume is not False and run.name is not None:
        directory = RunDirectory(root_of(run.root) / run.name)
        plain_files.check_directory(directory.path)
        if directory.exists():
            return None, directory, None
        if directory.is_sent and request.on_head is None:
            raise RunError(
                f'The run "{run.name}" was submitted to a cluster, and its files were not copied to this machine yet. '
                f"Copy them with: launch logs {run.name}."
            )
        if run.resume is True:
            runs.find(root_of(run.root), run.name)  # raises an error with the most similar name
    if run.like is not None:
        return None, None, run_like(run.root, run.like)
    if problem is not None:
        raise problem
    return new, None, None


def _compose_like(request: Request, like: RunDirectory | None) -> Composition:
    assert like is not None
    words = [word for word in request.words if key_of(word) != "run.like"]
    composition = compose_stored(request, words, like)
    note_dropped(request, composition, like)
    if like.is_sent and not any(key_of(word) == "run.root" for word in words):
        composition.job.run.root = like.root  # the recorded root is a directory on the head of its cluster
    return composition


# ---- resuming -------------------------------------------------------------------------------------------------------


def _resume(request: Request, directory: RunDirectory) -> Prepared:
    name = directory.name
    directory.require_idle()
    if (directory.path / "study.journal").is_file():
        raise RunError(f'"{name}" is a sweep: continue it with launch -m run.name={name} run.resume=true.')
    composition, changes = over_the_run(request, directory)
    job = composition.job
    old = compose_stored(request, [], directory).job if changes else job
    check_continuation(old, job, name)
    job.run.name, job.run.root = name, directory.root
    length = [(some.trainer.epochs, some.trainer.steps) for some in (old, job)]
    result = directory.result()
    # A run that a callback stopped early continues with any other override, such as a larger patience.
    continues = length[0] != length[1] or (result.get("reason") is not None and bool(changes))
    finished = result.get("status") == "completed" and not continues
    return Prepared(composition, directory, resumes=True, finished=finished, changes=changes)


def over_the_run(request: Request, directory: RunDirectory) -> tuple[Composition, tuple[str, ...]]:
    """Return the run's own configuration with the new overrides, and these overrides with secrets masked.

    Raises:
        RunError: the run has no configuration.
        ConfigError, TrustError: the overrides or the stored configuration are wrong.
    """
    if not directory.config.is_file():
        raise RunError(
            f"{directory.config} is missing, so the run's configuration is lost. Restore the file, or start a new run "
            "with another run.name."
        )
    targets.add_calling_directory(request.calling)
    words = _new_words(request, directory)
    composition = compose_stored(request, words, directory)
    in_process = composition.job.cluster.of_kind.in_process and "cluster" in composition.given
    if in_process and "scaling.workers" not in composition.given and composition.job.scaling.workers != "auto":
        # The stored number was chosen for the run's former cluster.
        words.append("scaling.workers=auto")
        composition = compose_stored(request, words, directory)
    note_dropped(request, composition, directory)
    return composition, tuple(masked(word) for word in words)


def compose_stored(
    request: Request, words: Sequence[str], run: RunDirectory, own: Collection[str] | None = None
) -> Composition:
    """Compose overrides with the configuration of a run and the cluster that the user's record names for it.

    Args:
        own: the overrides that the user typed, if others come from a recorded sweep.
    """
    cluster = user_state.cluster_of(run) if request.settings is None else request.settings.section
    return compose(words, request.config_dir, run.config, cluster=cluster, settings=request.settings, own=own)


def note_dropped(request: Request, composition: Composition, run: RunDirectory) -> None:
    """Report the keys of a run's configuration that are ignored because a file may not set them."""
    if composition.dropped and request.on_head is None:
        request.note(
            f"Ignored from {run.config}: {', '.join(composition.dropped)}, because a file must not choose where code "
            f"runs or where secrets are sent. To use it, add: {authority.words_for(composition.dropped)}"
        )


def _new_words(request: Request, directory: RunDirectory) -> list[str]:
    """Return the overrides that the run does not have yet, so that the command that started a run can be repeated.

    The run has an override if it was recorded, and no later one for the same key. A secret is always returned, because
    its value is not recorded.
    """
    in_force = {key_of(word): word for word in recorded_words(directory)}
    words = [word for word in request.words if key_of(word) not in ("run.name", "run.resume", "run.root", "run.like")]
    if "experiment" not in in_force and any(key_of(word) == "experiment" for word in words):
        chosen = compose([], request.config_dir).choices.get("experiment")
        in_force["experiment"] = f"experiment={chosen}"
    return [word for word in words if in_force.get(key_of(word)) != word or masked(word) != word]


def recorded_words(directory: RunDirectory) -> list[str]:
    """Return the overrides in overrides.yaml; an empty list if it is missing or is not a list of strings."""
    try:
        lines = plain_files.read_text(directory.overrides).splitlines()
        words = [json.loads(line[2:]) for line in lines if line.startswith("- ")]
    except (OSError, ValueError, RecursionError):
        return []
    return [word for word in words if isinstance(word, str)]


# The sections and keys that must not change while a run is continued: its checkpoints depend on them.
_BOUND = ("model", "data", "optimizer", "scheduler", "strategy")
_BOUND_KEYS = ("seed", "shuffle", "drop_last", "global_batch_size", "overfit_batches", "deterministic", "precision")


def check_continuation(old: Job, new: Job, name: str) -> None:
    """Raise RunError if the overrides are incompatible with the saved state."""
    changed = [section for section in _BOUND if _identity(getattr(old, section)) != _identity(getattr(new, section))]
    changed += [f"trainer.{key}" for key in _BOUND_KEYS if getattr(old.trainer, key) != getattr(new.trainer, key)]
    if changed:
        raise RunError(
            f'The run "{name}" cannot be continued with another {", ".join(changed)}: its checkpoints depend on the '
            f"original value. Remove the override, or start a new run from its configuration with run.like={name}."
        )


def check_same_model(old: Job, new: Job, name: str) -> None:
    """Raise RunError if the overrides name another model than the run's, since its weights would not fit."""
    if not same_section(old.model, new.model):
        raise RunError(
            f'The run "{name}" cannot be used with another model: its checkpoints depend on the original model. '
            f"Remove the override, or start a new run with checkpoint.load={name}."
        )


def same_section(one: object, other: object) -> bool:
    """Return whether two sections describe the same data, or the same model."""
    return _identity(one) == _identity(other)


def _identity(section: object) -> object:
    """Return the part of a section that must not change: not the loader processes, nor the learning rate."""
    if isinstance(section, StrategyConfig):
        return identity(section)
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("num_workers", "lr")}


# ---- names and directories ------------------------------------------------------------------------------------------


def _name_for_derived(run: RunDirectory) -> str:
    """Return the name of a run for use in another run's name; for a trial, it includes the name of the sweep."""
    sweep = run.path.parent
    return f"{sweep.name}-{run.name}" if (sweep / "study.journal").is_file() else run.name


def run_like(root: str, name: str) -> RunDirectory:
    """Return the run that `run.like` names. Raises RunError if there is none, or if it is a sweep."""
    found = runs.find(where_others_are(root), name)
    if (found.path / "study.journal").is_file():
        raise RunError(f"run.like={name}: {name} is a sweep. Name one of its trials: {name}/best, or {name}/NUMBER.")
    if not found.config.is_file():
        raise RunError(f"{found.config} is missing; run.like={name} needs it.")
    return found


def root_of(root: str) -> Path:
    """Return the run root as an absolute path. For an object store, it is the updated copy on this machine.

    Raises:
        ConfigError: the URI cannot be used.
        RunError: the object store cannot be read.
    """
    if is_uri(root):
        try:
            return mirror.root_of(root)
        except StorageError as error:  # a RunError, because nothing was started
            raise RunError(f"run.root={root} cannot be used: {error}") from error
    return Path(plain_path(root)).expanduser().absolute()


def where_others_are(root: str) -> Path:
    """Return the directory in which `run.like` and `checkpoint.load` find other runs, as `root_of`.

    For a gathered root (head:///PATH), it is that path on the driver's machine.
    """
    return disk_path(check_uri(root)) if is_gathered(root) else root_of(root)


def key_of(word: str) -> str:
    """Return the key or group of an override."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def unused(directory: RunDirectory) -> RunDirectory:
    """Return the directory, with a number appended to its name if another run was started in the same second."""
    number = 1
    candidate = directory
    while candidate.path.exists():
        number += 1
        candidate = RunDirectory(directory.path.with_name(f"{directory.name}-{number}"))
    return candidate
