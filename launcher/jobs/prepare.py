"""Which run the words of a command mean, and with which configuration: a new one, one that goes on, one like another.

Nothing is written here; `launcher.jobs.training` and `launcher.jobs.record` do what was decided.
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
    """What the user asked for.

    Args:
        words: Hydra overrides.
        config_dir: a directory of the user's own configuration, or None.
        calling: the directory where the command was given; its modules may be named in the configuration.
        started: wall-clock time of the command.
        on_head: HOST:PORT of the Ray cluster whose head this process drives the run on, for somebody elsewhere.
        settings: on a head, what the sender decided on the cluster; else the user's own settings are read.
        note: gets a line about what is dropped from a configuration.
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
    """A run that is ready to start, or one with nothing left to do (`finished`).

    `changes` are the words that change something about a run that exists, fit for the terminal. `like` is the run that
    `run.like` names.
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
        """Return why a finished run is not continued, and the word that continues it."""
        result, trainer = self.directory.result(), self.job.trainer
        reason, steps, epochs = result.get("reason"), result.get("steps") or 0, result.get("epochs") or 0.0
        name = self.directory.name
        if reason is None:
            return f"{name} is completed; there is nothing to do. Train it further with trainer.epochs=N."
        total = trainer.steps or (round(trainer.epochs * steps / epochs) if epochs else 0)
        patient = [
            f"callbacks.{callback}.patience"
            for callback, section in self.job.callbacks.items()
            if section and str(section.get("_target_", "")).endswith("EarlyStopping")
        ]
        if reason == "early_stopping" and patient:
            words = f"a larger {' or '.join(patient)}"
        else:
            words = "other words for the callback that ended it"
        return (
            f"{name} stopped at {steps} of {total} steps: a callback ended it early ({reason}). A resume with the same "
            f"words would do nothing. Continue it with run.resume=true and {words}."
        )


def prepare(request: Request) -> Prepared:
    """Compose the job and decide on its run.

    Raises:
        ConfigError, TrustError: the words or the configuration are wrong.
        RunError: the run exists already, does not exist, is running, or cannot be continued with these words.
    """
    prepared = _prepared(request)
    at_hand(request, prepared.job)
    return prepared


def at_hand(request: Request, job: Job) -> None:
    """Have a job whose driver is this head use the workers that are at hand; config.yaml keeps what its user wrote."""
    if request.on_head is not None:
        job.cluster = attached(job.cluster, request.on_head)


def _prepared(request: Request) -> Prepared:
    new, resumed, like = _meant(request)
    if resumed is not None:
        return _continue(request, resumed)
    composition = new or _compose_like(request, like)
    root = root_of(composition.job.run.root)
    name = composition.job.run.name
    if name is None:
        choices = composition.choices if like is None else {"experiment": _spoken(like)}
        return Prepared(composition, unused(RunDirectory(root / default_run_name(choices, datetime.now()))), like=like)
    directory = RunDirectory(root / name)
    if directory.exists():
        raise RunError(
            f'The run "{name}" exists already in {directory.root}. Continue it with run.resume=true, or choose another '
            "run.name."
        )
    return Prepared(composition, directory, like=like)


def composed(request: Request) -> Composition:
    """Return the configuration that `train` would use, whether or not the run may start; for `--help` and `--cfg`."""
    new, resumed, like = _meant(request)
    if resumed is not None:
        return over_the_run(request, resumed)[0]
    return new or _compose_like(request, like)


def run_section(request: Request) -> RunConfig:
    """Return the section `run` of what the words compose to; other words may be meant for a run's own configuration."""
    try:
        run: RunConfig = peek(request.words, request.config_dir, "run")
    except RequestError:
        run = peek([word for word in request.words if key_of(word).startswith("run.")], request.config_dir, "run")
    check_run(run)
    return run


def _meant(request: Request) -> tuple[Composition | None, RunDirectory | None, RunDirectory | None]:
    """Return (what a new run is composed to, the run that is continued, the run that is imitated): one of the three."""
    targets.add_calling_directory(request.calling)
    new: Composition | None = None
    problem: RequestError | None = None
    try:
        new = compose(request.words, request.config_dir, settings=request.settings)
        run = new.job.run
    except RequestError as error:  # perhaps the words make sense over the configuration of a run that they name
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
                f'The run "{run.name}" was sent to a cluster, and nothing of it is here yet. Bring it with: launch '
                f"logs {run.name}."
            )
        if run.resume is True:
            runs.find(root_of(run.root), run.name)  # raises, and names the nearest
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
        composition.job.run.root = like.root  # the root that was recorded is a place on the head of its cluster
    return composition


# ---- going on -------------------------------------------------------------------------------------------------------


def _continue(request: Request, directory: RunDirectory) -> Prepared:
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
    # One that a callback has ended early goes on with any other word, such as a larger patience.
    goes_on = length[0] != length[1] or (result.get("reason") is not None and bool(changes))
    finished = result.get("status") == "completed" and not goes_on
    return Prepared(composition, directory, resumes=True, finished=finished, changes=changes)


def over_the_run(request: Request, directory: RunDirectory) -> tuple[Composition, tuple[str, ...]]:
    """Return the run's own configuration under the words that are new to it, and those words fit for the terminal.

    Raises:
        RunError: the run has no configuration.
        ConfigError, TrustError: the words, or what was stored, are wrong.
    """
    if not directory.config.is_file():
        raise RunError(
            f"{directory.config} is missing, so that nobody knows how the run was configured. Restore it, or start "
            "a new run under another run.name."
        )
    targets.add_calling_directory(request.calling)
    words = _new_words(request, directory)
    composition = compose_stored(request, words, directory)
    alone = composition.job.cluster.of_kind.in_process and "cluster" in composition.given
    if alone and "scaling.workers" not in composition.given and composition.job.scaling.workers != "auto":
        # The number belongs to the cluster that the run had.
        words.append("scaling.workers=auto")
        composition = compose_stored(request, words, directory)
    note_dropped(request, composition, directory)
    return composition, tuple(masked(word) for word in words)


def compose_stored(
    request: Request, words: Sequence[str], run: RunDirectory, own: Collection[str] | None = None
) -> Composition:
    """Compose words over the configuration of a run, on the cluster that the user's own record has for it.

    own: the words that the user typed, where others come from a recorded sweep.
    """
    cluster = user_state.cluster_of(run) if request.settings is None else request.settings.section
    return compose(words, request.config_dir, run.config, cluster=cluster, settings=request.settings, own=own)


def note_dropped(request: Request, composition: Composition, run: RunDirectory) -> None:
    """Print in one line which keys of a run's configuration are not used, since a file may not decide them."""
    if composition.dropped and request.on_head is None:
        request.note(
            f"Not used from {run.config}: {', '.join(composition.dropped)}, since a file does not choose where code "
            f"runs or where secrets go. To use it, add: {authority.words_for(composition.dropped)}"
        )


def _new_words(request: Request, directory: RunDirectory) -> list[str]:
    """Leave out what is in force already, so that the very command that started a run may be given again.

    A word is in force when the run was given the same word and none about the same key after it. A secret is never left
    out: its value was not kept.
    """
    in_force = {key_of(word): word for word in recorded_words(directory)}
    words = [word for word in request.words if key_of(word) not in ("run.name", "run.resume", "run.root", "run.like")]
    if "experiment" not in in_force and any(key_of(word) == "experiment" for word in words):
        chosen = compose([], request.config_dir).choices.get("experiment")
        in_force["experiment"] = f"experiment={chosen}"
    return [word for word in words if in_force.get(key_of(word)) != word or masked(word) != word]


def recorded_words(directory: RunDirectory) -> list[str]:
    """Return the words of overrides.yaml; none where it is missing or is not a list of texts."""
    try:
        lines = plain_files.read_text(directory.overrides).splitlines()
        words = [json.loads(line[2:]) for line in lines if line.startswith("- ")]
    except (OSError, ValueError, RecursionError):
        return []
    return [word for word in words if isinstance(word, str)]


# What a checkpoint is bound to: changing it would not continue the run but start another.
_BOUND = ("model", "data", "optimizer", "scheduler", "strategy")
_BOUND_KEYS = ("seed", "shuffle", "drop_last", "global_batch_size", "overfit_batches", "deterministic", "precision")


def check_continuation(old: Job, new: Job, name: str) -> None:
    """Raise RunError where the words would break the saved state."""
    changed = [section for section in _BOUND if _identity(getattr(old, section)) != _identity(getattr(new, section))]
    changed += [f"trainer.{key}" for key in _BOUND_KEYS if getattr(old.trainer, key) != getattr(new.trainer, key)]
    if changed:
        raise RunError(
            f'The run "{name}" cannot be continued with another {", ".join(changed)}: its checkpoints belong to what '
            f"it was started with. Leave the word out, or start a new run from its configuration with run.like={name}."
        )


def check_same_model(old: Job, new: Job, name: str) -> None:
    """Raise RunError where the words name another model than that of the run, whose weights would not be its."""
    if not same_section(old.model, new.model):
        raise RunError(
            f'The run "{name}" cannot be used with another model: its checkpoints belong to what it was started with. '
            f"Leave the word out, or start a new run with checkpoint.load={name}."
        )


def same_section(one: object, other: object) -> bool:
    """Whether two sections mean the same data, or the same model."""
    return _identity(one) == _identity(other)


def _identity(section: object) -> object:
    """What must stay: not the number of loader processes, nor the learning rate, which may be mended on the way."""
    if isinstance(section, StrategyConfig):
        return identity(section)
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("num_workers", "lr")}


# ---- names and places -----------------------------------------------------------------------------------------------


def _spoken(run: RunDirectory) -> str:
    """Return a run's name as part of another's: a trial is called after its sweep."""
    sweep = run.path.parent
    return f"{sweep.name}-{run.name}" if (sweep / "study.journal").is_file() else run.name


def run_like(root: str, name: str) -> RunDirectory:
    found = runs.find(where_others_are(root), name)
    if (found.path / "study.journal").is_file():
        raise RunError(f"run.like={name}: {name} is a sweep. Name one of its trials: {name}/best, or {name}/NUMBER.")
    if not found.config.is_file():
        raise RunError(f"{found.config} is missing; run.like={name} needs it.")
    return found


def root_of(root: str) -> Path:
    """Return the run root as an absolute path: of one on an object store, its copy on this machine, brought up to date.

    Raises:
        ConfigError: it is a URI that cannot be used.
        RunError: the store cannot be read.
    """
    if is_uri(root):
        try:
            return mirror.root_of(root)
        except StorageError as error:  # told before anything is started
            raise RunError(f"run.root={root} was asked for: {error}") from error
    return Path(plain_path(root)).expanduser().absolute()


def where_others_are(root: str) -> Path:
    """Return the directory where other runs of a root are looked up, as `root_of`.

    Of a gathered one it is the place itself: what `run.like` and `checkpoint.load` name lies on the driver's machine.
    """
    return disk_path(check_uri(root)) if is_gathered(root) else root_of(root)


def key_of(word: str) -> str:
    """Return the key or group that a word of the command line is about."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def unused(directory: RunDirectory) -> RunDirectory:
    """Return the directory, with a number behind its name when another run began in the same second."""
    number = 1
    candidate = directory
    while candidate.path.exists():
        number += 1
        candidate = RunDirectory(directory.path.with_name(f"{directory.name}-{number}"))
    return candidate
