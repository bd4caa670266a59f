"""What the words of `launch -m` mean, before anybody looks at machines: which sweep, over what, towards what.

Only the directory of a sweep that is continued is touched (a journal that a killed driver has left half-written).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

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
from launcher.runs.storage import disk_uri, is_gathered, is_uri
from launcher.sweeps import syntax
from launcher.sweeps.search import distributions, sampler
from launcher.sweeps.study import JOURNAL, Objective, SweepRecord, read_record, repair
from launcher.sweeps.syntax import ChoiceAxis, SearchSpace, Value


@dataclass(frozen=True)
class SweepSpec:
    """A sweep that is spec, wherever it is driven. `first` is its first trial, `total` counts all of them.

    like: the run that `run.like` names. own: the words that the user typed, where others were recorded or come from
    `hydra.sweeper.params` of a file, and may not choose where code runs (`launcher.config.authority`).
    root: run.root as it was said. Where that is `head:///PATH` the sweep lies on the disk of the machine that drives
    it, and machines of its workers have no part of it.
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

    @property
    def cluster(self) -> ClusterConfig:
        """Of the sweep as a whole."""
        return self.first.job.cluster

    def compose(self, values: dict[str, Value]) -> Composition:
        """Compose a trial. Raises ConfigError."""
        keys = ",".join(f"'{axis.key}'" for axis in self.space.axes)
        return self.compose_words([*self.space.trial(values), f"logging.hparams=[{keys}]"])

    def compose_words(self, words: Sequence[str]) -> Composition:
        """Compose the words of a trial, whose name and place are the sweep's business. Raises ConfigError."""
        return _compose(self.request, words, self.like, self.own)

    def told(self, how: str | None = None) -> str:
        """Return the one line that a sweep begins with. how: what is known of how it runs."""
        kind = "grid over" if self.settings.sampler == "grid" else f"{self.settings.sampler} search over"
        keys = ", ".join(axis.key for axis in self.space.axes) or "nothing"
        goal = ", ".join(f"{objective.direction} {objective.tag}" for objective in self.objectives)
        trials = f"{self.total} trial{'s' if self.total > 1 else ''}, a {kind} {keys}"
        return "; ".join(part for part in (trials, how, goal) if part)

    def task_directory(self, run: RunDirectory) -> str:
        """Return a trial's directory as its workers find it."""
        return disk_uri(run.path) if is_gathered(self.root) else str(run.path)


def read_sweep(request: Request) -> SweepSpec:
    """Work out which sweep the words of `launch -m` mean.

    Raises:
        ConfigError, TrustError: a word cannot be read, swept or searched, or the first trial cannot be composed.
        RunError: the sweep exists already, does not exist, is running, or cannot be continued with these words.
    """
    if ranks.in_environment() is not None:
        raise ConfigError(
            "A sweep starts its own workers, and torchrun or srun has started some already: call launch -m by itself."
        )
    targets.add_calling_directory(request.calling)
    words = syntax.plain_words(request.words)
    run = peek([word for word in words if key_of(word).startswith("run.")], request.config_dir, "run")
    check_run(run)
    if is_uri(run.root) and not is_gathered(run.root):
        raise ConfigError(
            f"run.root={run.root}: a sweep keeps its study in a directory, which an object store does not serve. Give "
            "a path, and copy the best run when it is done. (With cluster=existing all machines share it, or gather "
            "the sweep with head:///PATH; with cluster=ssh and azure it comes back to it.)"
        )
    root = where_others_are(run.root)
    if run.resume is not False and run.name is not None:
        directory = RunDirectory(root / run.name)
        plain_files.check_directory(directory.path)
        if directory.is_sent and request.on_head is None and not directory.exists():
            fetch_files(directory)
        if (directory.path / JOURNAL).is_file():
            return _continued(request, words, directory, run.root)
        if directory.exists():
            raise RunError(f'"{run.name}" is a single run: continue it without -m.')
        if directory.is_sent and request.on_head is None:
            raise RunError(f'The sweep "{run.name}" was sent to a cluster, and has not begun there yet.')
        if run.resume is True:
            runs.find(root, run.name)  # raises, and names the nearest
    if run.name is not None and _is_taken(root / run.name, request):
        raise RunError(
            f'"{run.name}" exists already in {root}. Continue it with run.resume=true, or choose another run.name.'
        )
    return _build_spec(request, words, None if run.name is None else RunDirectory(root / run.name), run.root)


def _is_taken(path: Path, request: Request) -> bool:
    """Whether a sweep cannot have this directory. On a head its caller may have left word in it of where it runs."""
    return path.exists() and not (request.on_head and {file.name for file in path.iterdir()} <= {runs.REMOTE})


def _continued(request: Request, words: list[str], directory: RunDirectory, root: str) -> SweepSpec:
    name = directory.name
    if directory.status() == "running":
        raise RunError(f'The sweep "{name}" is running. Stop it with: launch stop {name}.')
    repair(directory.path)
    before = read_record(directory.path)
    own, config_dir = _own(directory, request)
    kept, dropped = _without_decisions(before.words)
    if own is None and request.on_head is None:
        _note_dropped(request, directory, dropped, before.config_dir if request.config_dir is None else None)
    if request.config_dir is None and config_dir is not None:
        request = replace(request, config_dir=Path(config_dir))
    merged = _merged([*(word for word in kept if key_of(word) not in REMOVED), *(own or ())], words, name)
    trust = [word for word in merged if key_of(word) == "trust" and word not in words]  # for the head, if it is sent
    request = replace(request, words=[*request.words, *trust])
    return replace(_build_spec(request, merged, directory, root, (*(own or ()), *words)), resumes=True)


def _own(directory: RunDirectory, request: Request) -> tuple[list[str] | None, str | None]:
    """Return what the user's own record has of a sweep: words that only they may decide, and the configuration."""
    record = None if request.on_head is not None else user_state.lookup(directory)
    if record is None or record.words is None:
        return None, None
    place = location_of(directory)
    return record.words, record.config_dir if place is None else place.config_dir


def save_user_record(spec: SweepSpec) -> None:
    """Record for this user what the journal may not decide when the sweep is continued. RunError where it cannot be."""
    if spec.request.on_head is not None:
        return
    typed = spec.recorded.words if spec.own is None else tuple(masked(word) for word in spec.own)
    decided, config_dir = list(dict.fromkeys(_without_decisions(typed)[1])), spec.recorded.config_dir
    if decided or config_dir or user_state.lookup(spec.directory):
        user_state.save(spec.directory, words=decided, config_dir=config_dir)


def _without_decisions(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without those that a file may not decide, and those."""
    kept: list[str] = []
    decided: list[str] = []
    for word in words:
        override = syntax.parse(word)
        (decided if authority.is_guarded_word(override.key_or_group, override.value()) else kept).append(word)
    return kept, decided


def _note_dropped(request: Request, directory: RunDirectory, dropped: Sequence[str], config_dir: str | None) -> None:
    words = [masked(word) for word in dropped] + ([f"--config-dir {config_dir}"] if config_dir is not None else [])
    if words:
        request.note(
            f"Not used from the record of {directory.path}: {masked(' '.join(words))}, since a file does not choose "
            "where code runs or where secrets go, and this user has no record of the sweep. To use it, add it to the "
            "command line."
        )


def _merged(before: Sequence[str], given: Sequence[str], name: str) -> list[str]:
    """Return the words of the sweep with those given now: its settings may change, its trials must stay comparable."""
    words = list(before)
    for word in given:
        key = key_of(word)
        if masked(word) in words:  # a secret was not kept, and is given again
            words[words.index(masked(word))] = word
        elif key == "cluster":  # its keys belong to the one before
            words = [other for other in words if key_of(other).partition(".")[0] != key] + [word]
        elif key.partition(".")[0] in ("sweep", "cluster", "verbose", "trust"):
            words = [other for other in words if key_of(other) != key] + [word]
        elif not key.startswith("run."):
            raise RunError(
                f'The sweep "{name}" cannot be continued with {masked(word)}: its trials would no longer be '
                "comparable. Leave it out (sweep.*, cluster.*, trust and verbose may change), or start a new sweep."
            )
    return words


def _build_spec(
    request: Request,
    words: list[str],
    directory: RunDirectory | None,
    root: str,
    own: tuple[str, ...] | None = None,
) -> SweepSpec:
    like = _like(words, root)
    said = [masked(word) for word in words]
    words = [word for word in words if key_of(word) != "run.like"]
    groups = sources(request.config_dir).groups()
    space = syntax.read(words, {}, groups)
    first = _compose(request, space.first(), like, own)
    if like is not None:
        note_dropped(request, first, like)
    seed = first.job.sweep.seed
    params = first.sweeper.get("params") or {}
    if params or seed:
        space = syntax.read(words, params, groups, seed)
        own = tuple(words) if own is None else own  # what files want to be swept is no word of the user
        first = _compose(request, space.first(), like, own)
    settings = _settings(first, space)
    objectives = _objectives(first, settings)
    total = _total(settings, space)
    _check_searchable(settings, space, objectives)
    if directory is None:
        directory = unused(RunDirectory(where_others_are(root) / default_run_name(first.choices, datetime.now())))
    config_dir = str(request.config_dir) if request.config_dir else None
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
        recorded=SweepRecord(tuple(said), config_dir),
        root=root,
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


def _of_trials(words: Sequence[str]) -> list[str]:
    """Leave out what belongs to the sweep: a trial's name is its number."""
    return [word for word in words if not key_of(word).startswith("run.")]


def _settings(first: Composition, space: SearchSpace) -> SweepConfig:
    settings = first.job.sweep
    chosen = {"sweep", "sweep.sampler"} & first.given
    if settings.sampler == "grid" and settings.trials is not None and not space.finite and not chosen:
        return replace(settings, sampler="tpe")  # so many trials of something endless: a search was spec
    return settings


def _objectives(first: Composition, settings: SweepConfig) -> tuple[Objective, ...]:
    checkpoint = first.job.checkpoint
    tags = settings.metric if isinstance(settings.metric, list) else [settings.metric or checkpoint.monitor]
    given = settings.direction
    directions: list[Any] = list(given) if isinstance(given, list) else [given] * len(tags)
    if not tags or not all(isinstance(tag, str) for tag in tags):
        raise ConfigError("The sweep needs to know what is best: sweep.metric=TAG (checkpoint.monitor is null).")
    if len(directions) != len(tags):
        raise ConfigError(
            f"sweep.metric has {len(tags)} tags and sweep.direction {len(directions)}: give one for each."
        )
    default = [checkpoint.mode if tag == checkpoint.monitor else "min" for tag in tags]
    found = zip(tags, directions, default, strict=True)
    return tuple(Objective(tag, direction or usual) for tag, direction, usual in found)


def _total(settings: SweepConfig, space: SearchSpace) -> int:
    distributions(space, settings.sampler == "grid")  # raises for what has no grid
    if settings.sampler == "grid":
        if settings.trials is not None:
            raise ConfigError(
                f"sweep.trials={settings.trials}: a grid has as many trials as combinations. Leave it out, or "
                "search: sweep=random, tpe, gp or cmaes."
            )
        total = 1
        for axis in space.axes:
            total *= len(axis.values) if isinstance(axis, ChoiceAxis) else 1
        if total > 100_000:
            raise ConfigError(f"The grid has {total:,} trials. Search instead: sweep=tpe sweep.trials=100.")
        return total
    if settings.trials is None:
        raise ConfigError(f"sweep={settings.sampler} searches for as long as it is told: add sweep.trials=20.")
    if not space.axes:
        raise ConfigError(
            f"sweep={settings.sampler} has nothing to search over: give a key several values, such as "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))'."
        )
    return settings.trials


def _check_searchable(settings: SweepConfig, space: SearchSpace, objectives: Sequence[Objective]) -> None:
    sampler(settings, space, 0)
    if len(objectives) > 1 and settings.pruner != "none":
        raise ConfigError("sweep.pruner needs one objective: leave it out, or give a single sweep.metric.")
    if len(objectives) > 1 and settings.sampler in ("cmaes", "gp"):
        raise ConfigError(f"sweep={settings.sampler} has one objective. For several use sweep=nsga2.")
