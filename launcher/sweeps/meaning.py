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
from launcher.config import Composition, SweepConfig, compose, default_run_name, peek, sources, targets
from launcher.config.checks import check_run
from launcher.config.keys import REMOVED
from launcher.config.schema import ClusterConfig
from launcher.config.words import shown
from launcher.errors import ConfigError, RunError
from launcher.jobs import ranks
from launcher.jobs.prepare import Request, at_hand, key_of, run_like, unused, where_others_are
from launcher.jobs.remote.attend import bring_here
from launcher.jobs.remote.place import place_of
from launcher.runs import RunDirectory
from launcher.runs.storage import disk_uri, is_gathered, is_uri
from launcher.sweeps import syntax
from launcher.sweeps.space import distributions, sampler
from launcher.sweeps.study import JOURNAL, Objective, Recorded, mend, recorded
from launcher.sweeps.syntax import Choice, Value, Words


@dataclass(frozen=True)
class Meant:
    """A sweep that is meant, wherever it is driven. `first` is its first trial, `total` counts all of them.

    root: run.root as it was said. Where that is `head:///PATH` the sweep lies on the disk of the machine that drives
    it, and machines of its workers have no part of it.
    """

    request: Request
    directory: RunDirectory
    words: Words
    settings: SweepConfig
    objectives: tuple[Objective, ...]
    total: int
    first: Composition
    stored: Path | None
    recorded: Recorded
    root: str
    resumes: bool = False

    @property
    def cluster(self) -> ClusterConfig:
        """Of the sweep as a whole; the Ray of a sweep is not kept."""
        return replace(self.first.job.cluster, keep_minutes=0.0)

    def compose(self, values: dict[str, Value]) -> Composition:
        """Compose a trial. Raises ConfigError."""
        keys = ",".join(f"'{axis.key}'" for axis in self.words.axes)
        return self.compose_words([*self.words.trial(values), f"logging.hparams=[{keys}]"])

    def compose_words(self, words: Sequence[str]) -> Composition:
        """Compose the words of a trial, whose name and place are the sweep's business. Raises ConfigError."""
        return _compose(self.request, words, self.stored)

    def told(self, how: str | None = None) -> str:
        """Return the one line that a sweep begins with. how: what is known of how it runs."""
        kind = "grid over" if self.settings.sampler == "grid" else f"{self.settings.sampler} search over"
        keys = ", ".join(axis.key for axis in self.words.axes) or "nothing"
        goal = ", ".join(f"{objective.direction} {objective.tag}" for objective in self.objectives)
        trials = f"{self.total} trial{'s' if self.total > 1 else ''}, a {kind} {keys}"
        return "; ".join(part for part in (trials, how, goal) if part)

    def task_directory(self, run: RunDirectory) -> str:
        """Return a trial's directory as its workers find it."""
        return disk_uri(run.path) if is_gathered(self.root) else str(run.path)


def read_sweep(request: Request) -> Meant:
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
        if directory.is_sent and request.on_head is None and not directory.exists():
            bring_here(directory)
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
    return _meant(request, words, None if run.name is None else RunDirectory(root / run.name), run.root)


def _is_taken(path: Path, request: Request) -> bool:
    """Whether a sweep cannot have this directory. On a head its caller may have left word in it of where it runs."""
    return path.exists() and not (request.on_head and {file.name for file in path.iterdir()} <= {runs.REMOTE})


def _continued(request: Request, words: list[str], directory: RunDirectory, root: str) -> Meant:
    name = directory.name
    if directory.status() == "running":
        raise RunError(f'The sweep "{name}" is running. Stop it with: launch stop {name}.')
    mend(directory.path)
    before = recorded(directory.path)
    place = place_of(directory)  # of one that was sent the journal has words of the head
    config_dir = before.config_dir if place is None else place.config_dir
    if request.config_dir is None and config_dir is not None:
        request = replace(request, config_dir=Path(config_dir))
    merged = _merged([word for word in before.words if key_of(word) not in REMOVED], words, name)
    return replace(_meant(request, merged, directory, root), resumes=True)


def _merged(before: Sequence[str], given: Sequence[str], name: str) -> list[str]:
    """Return the words of the sweep with those given now: its settings may change, its trials must stay comparable."""
    words = list(before)
    for word in given:
        key = key_of(word)
        if shown(word) in words:  # a secret was not kept, and is given again
            words[words.index(shown(word))] = word
        elif key == "cluster":  # its keys belong to the one before
            words = [other for other in words if key_of(other).partition(".")[0] != key] + [word]
        elif key.partition(".")[0] in ("sweep", "cluster", "verbose"):
            words = [other for other in words if key_of(other) != key] + [word]
        elif not key.startswith("run."):
            raise RunError(
                f'The sweep "{name}" cannot be continued with {shown(word)}: its trials would no longer be comparable. '
                "Leave the word out (sweep.*, cluster.* and verbose may change), or start a new sweep."
            )
    return words


def _meant(request: Request, words: list[str], directory: RunDirectory | None, root: str) -> Meant:
    stored = _like(words, root)
    said = [shown(word) for word in words]
    words = [word for word in words if key_of(word) != "run.like"]
    groups = sources(request.config_dir).groups()
    space = syntax.read(words, {}, groups)
    first = _compose(request, space.first(), stored)
    seed = first.job.sweep.seed
    params = first.sweeper.get("params") or {}
    if params or seed:
        space = syntax.read(words, params, groups, seed)
        first = _compose(request, space.first(), stored)
    settings = _settings(first, space)
    objectives = _objectives(first, settings)
    total = _total(settings, space)
    _check_searchable(settings, space, objectives)
    if directory is None:
        directory = unused(RunDirectory(where_others_are(root) / default_run_name(first.choices, datetime.now())))
    config_dir = str(request.config_dir) if request.config_dir else None
    return Meant(
        request=request,
        directory=directory,
        words=space,
        settings=settings,
        objectives=objectives,
        total=total,
        first=first,
        stored=stored,
        recorded=Recorded(tuple(said), config_dir),
        root=root,
    )


def _compose(request: Request, words: Sequence[str], stored: Path | None) -> Composition:
    composition = compose(_of_trials(words), request.config_dir, stored)
    at_hand(request, composition.job)
    return composition


def _like(words: Sequence[str], root: str) -> Path | None:
    name = next((word.partition("=")[2] for word in words if key_of(word) == "run.like"), None)
    return None if name is None else run_like(root, name).config


def _of_trials(words: Sequence[str]) -> list[str]:
    """Leave out what belongs to the sweep: a trial's name is its number."""
    return [word for word in words if not key_of(word).startswith("run.")]


def _settings(first: Composition, space: Words) -> SweepConfig:
    settings = first.job.sweep
    chosen = {"sweep", "sweep.sampler"} & first.given
    if settings.sampler == "grid" and settings.trials is not None and not space.finite and not chosen:
        return replace(settings, sampler="tpe")  # so many trials of something endless: a search was meant
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


def _total(settings: SweepConfig, space: Words) -> int:
    distributions(space, settings.sampler == "grid")  # raises for what has no grid
    if settings.sampler == "grid":
        if settings.trials is not None:
            raise ConfigError(
                f"sweep.trials={settings.trials}: a grid has as many trials as combinations. Leave it out, or "
                "search: sweep=random, tpe, gp or cmaes."
            )
        total = 1
        for axis in space.axes:
            total *= len(axis.values) if isinstance(axis, Choice) else 1
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


def _check_searchable(settings: SweepConfig, space: Words, objectives: Sequence[Objective]) -> None:
    sampler(settings, space, 0)
    if len(objectives) > 1 and settings.pruner != "none":
        raise ConfigError("sweep.pruner needs one objective: leave it out, or give a single sweep.metric.")
    if len(objectives) > 1 and settings.sampler in ("cmaes", "gp"):
        raise ConfigError(f"sweep={settings.sampler} has one objective. For several use sweep=nsga2.")
