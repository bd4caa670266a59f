"""The specification of a sweep, read from the words of `launch -m`: directory, search space, settings and objectives.

Nothing is written, except that the journal of a resumed sweep is repaired if its driver was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from optuna.trial import FrozenTrial

from launcher import runs
from launcher.config import Composition, SweepConfig, authority, compose, default_run_name, peek, sources, targets
from launcher.config.checks import check_run
from launcher.config.keys import REMOVED
from launcher.config.overrides import masked
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError, RunError
from launcher.jobs import ranks
from launcher.jobs.prepare import (
    Request,
    at_hand,
    compose_stored,
    key_of,
    note_dropped,
    run_like,
    unused,
    where_others_are,
)
from launcher.jobs.remote.control import fetch_files
from launcher.jobs.remote.location import location_of
from launcher.runs import RunDirectory, plain_files, user_state
from launcher.runs.storage import disk_uri, is_gathered
from launcher.sweeps import syntax
from launcher.sweeps.algorithms import name_of
from launcher.sweeps.conditions import find_conditions, without_candidates
from launcher.sweeps.settings import (
    check_searchable,
    number_of_trials,
    objectives_of,
    repeated_keys,
    settings_of,
    warm_start_of,
)
from launcher.sweeps.space import SearchSpace, Value
from launcher.sweeps.stored import pull_sweep
from launcher.sweeps.study import JOURNAL, Objective, SweepRecord, read_record, repair
from launcher.sweeps.warm_start import WarmStart


@dataclass(frozen=True)
class SweepSpec:
    """A sweep as requested, independent of the machines that run it.

    Attributes:
        total: number of trials.
        first: composition of the first trial.
        like: the run of `run.like`.
        own: the words that the user typed, if others were recorded or come from `hydra.sweeper.params` of a file. Only
            the user's own words may choose where code runs (`launcher.config.authority`).
        recorded: the record for the journal.
        root: `run.root` as given. With `head:///PATH` the sweep is on the disk of the machine that drives it, which
            the machines of its workers do not share.
        resumes: whether an existing sweep is resumed.
        warm_start: the trials with which a new sweep starts; those of a resumed sweep are in its journal.
    """

    request: Request
    directory: RunDirectory
    space: SearchSpace
    settings: SweepConfig
    objectives: tuple[Objective, ...]
    total: int
    first: Composition
    like: RunDirectory | None
    own: tuple[str, ...] | None
    recorded: SweepRecord
    root: str
    resumes: bool = False
    warm_start: WarmStart | None = None

    @property
    def prior(self) -> tuple[FrozenTrial, ...]:
        """The trials of `sweep.warm_start`."""
        return () if self.warm_start is None else self.warm_start.trials

    @property
    def cluster(self) -> ClusterConfig:
        """The section `cluster`, which applies to the sweep as a whole."""
        return self.first.job.cluster

    def compose(self, values: dict[str, Value]) -> Composition:
        """Compose a trial. Raises ConfigError."""
        keys = ",".join(f"'{key}'" for key in values)
        return self.compose_words([*self.space.trial(values), f"logging.hparams=[{keys}]"])

    def compose_words(self, words: Sequence[str]) -> Composition:
        """Compose the words of a trial, without its name and directory. Raises ConfigError."""
        return _compose(self.request, words, self.like, self.own)

    def summary(self, how: str | None = None) -> str:
        """Return a one-line summary of the sweep. how: how it runs, if known."""
        kind = "grid over" if self.settings.sampler == "grid" else f"{name_of(self.settings.sampler)} search over"
        keys = ", ".join(key for key in self.space.keys if key not in self.space.over) or "nothing"
        goal = ", ".join(f"{objective.direction} {objective.tag}" for objective in self.objectives)
        trials = f"{self.total} trial{'s' if self.total > 1 else ''}, a {kind} {keys}"
        if self.space.over:
            trials += f", each repeated over {', '.join(self.space.over)}"
        start = None if self.warm_start is None else self.warm_start.summary()
        return "; ".join(part for part in (trials, start, how, goal) if part)

    def task_directory(self, run: RunDirectory) -> str:
        """Return the path or URI under which workers access a trial's directory."""
        return disk_uri(run.path) if is_gathered(self.root) else run.display_path()


def read_sweep(request: Request) -> SweepSpec:
    """Return the sweep that the words of `launch -m` request.

    Raises:
        ConfigError, TrustError: a word cannot be parsed or swept, or the first trial cannot be composed.
        RunError: the sweep exists already, does not exist, is running, or cannot be resumed with these words.
    """
    if ranks.in_environment() is not None:
        raise ConfigError(
            "A sweep starts its own workers, but torchrun or srun has already started some. Run launch -m without it."
        )
    targets.add_calling_directory(request.calling)
    words = syntax.plain_words(request.words)
    groups = sources(request.config_dir).groups()
    run = peek([word for word in syntax.read(words, {}, groups).first() if _names_run(word)], request.config_dir, "run")
    check_run(run)
    root = where_others_are(run.root)
    if run.resume is not False and run.name is not None:
        directory = RunDirectory(root / run.name)
        plain_files.check_directory(directory.path)
        if directory.exists():
            pull_sweep(directory)
        if directory.is_sent and request.on_head is None and not directory.exists():
            fetch_files(directory)
        if (directory.path / JOURNAL).is_file():
            return _continued(request, words, directory, run.root)
        if directory.exists():
            raise RunError(f'"{run.name}" is a single run, not a sweep. Resume it without -m.')
        if directory.is_sent and request.on_head is None:
            raise RunError(
                f'The sweep "{run.name}" was submitted to a cluster and has not started yet. Try again later.'
            )
        if run.resume is True:
            runs.find(root, run.name)  # raises an error with the nearest name
    if run.name is not None and _is_taken(root / run.name, request):
        raise RunError(
            f'"{run.name}" already exists in {root}. Resume it with run.resume=true, or choose another run.name.'
        )
    return _build_spec(request, words, None if run.name is None else RunDirectory(root / run.name), run.root)


def _is_taken(path: Path, request: Request) -> bool:
    """Return whether a directory cannot be used by a new sweep. On a head it may contain the record of its location."""
    return path.exists() and not (request.on_head and {file.name for file in path.iterdir()} <= {runs.REMOTE})


def _continued(request: Request, words: list[str], directory: RunDirectory, root: str) -> SweepSpec:
    name = directory.name
    if directory.status() == "running":
        raise RunError(f'The sweep "{name}" is already running. Stop it with: launch stop {name}.')
    repair(directory.path)
    record = read_record(directory.path)
    own, config_dir = _user_record(directory, request)
    recorded, guarded = _split_guarded(record.words)
    if own is None and request.on_head is None:
        _note_dropped(request, directory, guarded, record.config_dir if request.config_dir is None else None)
    if request.config_dir is None and config_dir is not None:
        request = replace(request, config_dir=Path(config_dir))
    merged = _merged([*(word for word in recorded if key_of(word) not in REMOVED), *(own or ())], words, name)
    trust = [word for word in merged if key_of(word) == "trust" and word not in words]  # the head needs it too
    request = replace(request, words=[*request.words, *trust])
    return _build_spec(request, merged, directory, root, (*(own or ()), *words), resumes=True)


def _user_record(directory: RunDirectory, request: Request) -> tuple[list[str] | None, str | None]:
    """Return the guarded words and the configuration directory of a sweep from the user's own record."""
    record = None if request.on_head is not None else user_state.lookup(directory)
    if record is None or record.words is None:
        return None, None
    place = location_of(directory)
    return record.words, record.config_dir if place is None else place.config_dir


def save_user_record(spec: SweepSpec) -> None:
    """Save the guarded words in the user's own record, since a journal may not choose where code runs on a resume.

    Raises:
        RunError: the record cannot be written.
    """
    if spec.request.on_head is not None:
        return
    typed = spec.recorded.words if spec.own is None else tuple(masked(word) for word in spec.own)
    guarded, config_dir = list(dict.fromkeys(_split_guarded(typed)[1])), spec.recorded.config_dir
    if guarded or config_dir or user_state.lookup(spec.directory):
        user_state.save(spec.directory, words=guarded, config_dir=config_dir)


def _split_guarded(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that a file may contain, and the guarded words, which only the user may choose."""
    plain: list[str] = []
    guarded: list[str] = []
    for word in words:
        override = syntax.parse(word)
        (guarded if authority.is_guarded_word(override.key_or_group, override.value()) else plain).append(word)
    return plain, guarded


def _note_dropped(request: Request, directory: RunDirectory, dropped: Sequence[str], config_dir: str | None) -> None:
    words = [masked(word) for word in dropped] + ([f"--config-dir {config_dir}"] if config_dir is not None else [])
    if words:
        request.note(
            f"Ignored in the record of {directory.path}: {masked(' '.join(words))}. A file may not choose where code "
            "runs or where secrets are sent, and this user has no record of the sweep. To use these words, add them to "
            "the command line."
        )


def _merged(before: Sequence[str], given: Sequence[str], name: str) -> list[str]:
    """Return the recorded and the new words of a resumed sweep. Only settings may change, so trials stay comparable."""
    words = list(before)
    for word in given:
        key = key_of(word)
        if masked(word) in words:  # the same word; a secret was recorded as ***
            words[words.index(masked(word))] = word
        elif key == "cluster":  # its keys belong to the previous kind
            words = [other for other in words if key_of(other).partition(".")[0] != key] + [word]
        elif key.partition(".")[0] in ("sweep", "cluster", "verbose", "trust") and key != "sweep.warm_start":
            words = [other for other in words if key_of(other) != key] + [word]
        elif not key.startswith("run."):
            raise RunError(
                f'The sweep "{name}" cannot be continued with {masked(word)}: its trials would no longer be '
                "comparable. Leave it out (cluster.*, other keys of sweep.*, trust and verbose may change), or start a "
                "new sweep."
            )
    return words


def _build_spec(
    request: Request,
    words: list[str],
    directory: RunDirectory | None,
    root: str,
    own: tuple[str, ...] | None = None,
    resumes: bool = False,
) -> SweepSpec:
    like = _like(words, root)
    recorded = SweepRecord(tuple(masked(word) for word in words), str(request.config_dir or "") or None)
    words = [word for word in words if key_of(word) != "run.like"]
    groups = sources(request.config_dir).groups()
    space = syntax.read(words, {}, groups)
    composed = (without_candidates(space, groups).first(), own)
    first = _compose(request, composed[0], like, own)
    if like is not None:
        note_dropped(request, first, like)
    seed = first.job.sweep.seed
    params = first.sweeper.get("params") or {}
    if params or seed:
        space = syntax.read(words, params, groups, seed)
        own = tuple(words) if own is None else own  # `hydra.sweeper.params` of files are not words of the user
    conditions = find_conditions(space, groups, lambda trial: _compose(request, trial, like, own).job)
    space = replace(space, conditions=conditions, over=repeated_keys(first.job.sweep, space, conditions))
    if (space.first(), own) != composed:
        first = _compose(request, space.first(), like, own)
    settings = settings_of(first, space)
    objectives = objectives_of(first, settings)
    total = number_of_trials(settings, space)
    check_searchable(settings, space, objectives, first.job.trust)
    start = None if resumes else warm_start_of(settings, space, objectives, root, first.job.trust)
    if directory is None:
        directory = unused(RunDirectory(where_others_are(root) / default_run_name(first.choices, datetime.now())))
    return SweepSpec(
        request=request,
        directory=directory,
        space=space,
        settings=settings,
        objectives=objectives,
        total=total,
        first=first,
        like=like,
        own=own,
        recorded=recorded,
        root=root,
        resumes=resumes,
        warm_start=start,
    )


def _compose(
    request: Request, words: Sequence[str], like: RunDirectory | None, own: tuple[str, ...] | None
) -> Composition:
    words = _of_trials(words)
    if like is None:
        composition = compose(words, request.config_dir, settings=request.settings, own=own)
    else:
        composition = compose_stored(request, words, like, own)
    at_hand(request, composition.job)
    return composition


def _like(words: Sequence[str], root: str) -> RunDirectory | None:
    name = next((word.partition("=")[2] for word in words if key_of(word) == "run.like"), None)
    return None if name is None else run_like(root, name)


def _names_run(word: str) -> bool:
    """Return whether a word may set the name or the root of the sweep: `run.*`, or an experiment with that section."""
    return key_of(word) == "experiment" or key_of(word).startswith("run.")


def _of_trials(words: Sequence[str]) -> list[str]:
    """Return the words without `run.*`: the name of a trial is its number."""
    return [word for word in words if not key_of(word).startswith("run.")]
