"""The Optuna study of a sweep, stored in `study.journal`: its trials, their values and their outcomes."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from launcher.config import SweepConfig
from launcher.errors import RunError
from launcher.sweeps import algorithms, repeats, search
from launcher.sweeps.repeats import Repeats
from launcher.sweeps.space import SearchSpace, Value

JOURNAL = "study.journal"
PRIOR = "prior"  # attribute of the trials of another sweep (`sweep.warm_start`): the name of that sweep
_MOST_WORDS = 1000
STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Objective:
    """A tag that the sweep minimizes (`min`) or maximizes (`max`)."""

    tag: str
    direction: str

    @classmethod
    def of_optuna(cls, tag: str, direction: StudyDirection) -> Objective:
        return cls(tag, "min" if direction == StudyDirection.MINIMIZE else "max")

    @property
    def for_optuna(self) -> StudyDirection:
        return StudyDirection.MINIMIZE if self.direction == "min" else StudyDirection.MAXIMIZE


@dataclass(frozen=True)
class SweepRecord:
    """The words and the configuration directory of a sweep, as recorded in its journal."""

    words: tuple[str, ...]
    config_dir: str | None


def quiet() -> None:
    """Silence Optuna's log messages and warnings; launch reports trials itself."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("cmaes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")


def read_record(directory: Path) -> SweepRecord:
    """Return the words and the configuration directory of the sweep in `directory`.

    Raises:
        RunError: its journal cannot be read.
    """
    attributes = load(directory).user_attrs
    words, config_dir = attributes.get("words", []), attributes.get("config_dir")
    if (
        not isinstance(words, list)
        or len(words) > _MOST_WORDS
        or not all(isinstance(word, str) for word in words)
        or not isinstance(config_dir, str | None)
    ):
        raise RunError(
            f"{directory / JOURNAL} is damaged: it does not contain the words of a sweep. Restore the file, or start "
            "the sweep under another run.name."
        )
    return SweepRecord(tuple(words), config_dir)


def load(directory: Path, **options: Any) -> optuna.Study:
    """Load Optuna's study of the sweep in `directory`. Raises RunError if its journal cannot be read."""
    quiet()
    path = directory / JOURNAL
    try:
        return optuna.load_study(study_name=directory.name, storage=_storage(path), **options)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, OSError) as error:
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Restore the file, or start the sweep under "
            "another run.name."
        ) from error


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def repair(directory: Path) -> None:
    """Remove the leftovers of a killed driver: a truncated line at the end of the journal, and the journal's lock."""
    path = directory / JOURNAL
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    with suppress(FileNotFoundError):
        (directory / f"{JOURNAL}.lock").unlink()


class Study:
    """Samples trials and records their outcomes. All changes are in the journal when a method returns.

    Trials are numbered from 0. The prior trials of `sweep.warm_start` precede them in the journal, where samplers find
    them; they are not among the trials of this class.

    Args:
        total: number of trials; of a grid, the number of combinations.
        evaluations: number of evaluations of a complete trial, None if unknown.
        start: the record of a new sweep; None to load an existing one.
        prior: the trials of another sweep with which a new sweep starts.
        trust: the packages of the user's own samplers and pruners.
    """

    def __init__(
        self,
        directory: Path,
        space: SearchSpace,
        settings: SweepConfig,
        objectives: Sequence[Objective],
        total: int,
        evaluations: int | None,
        start: SweepRecord | None,
        prior: Sequence[FrozenTrial] = (),
        trust: Sequence[str] = (),
    ) -> None:
        quiet()
        self.space, self.total, self.objectives = space, total, tuple(objectives)
        self._grid = settings.sampler == "grid"
        self._distributions = search.distributions(space, self._grid)
        pruner = algorithms.pruner(settings, evaluations, trust)
        if start is None:
            self._study = load(directory, pruner=pruner)
        else:
            self._study = optuna.create_study(
                study_name=directory.name,
                storage=_storage(directory / JOURNAL),
                directions=[objective.for_optuna for objective in objectives],
                pruner=pruner,
            )
            self._study.set_user_attr("words", list(start.words))
            self._study.set_user_attr("config_dir", start.config_dir)
            self._study.set_user_attr("tags", [objective.tag for objective in objectives])
            self._study.add_trials(prior)
        self._prior = list(itertools.takewhile(lambda trial: PRIOR in trial.user_attrs, self._all()))
        self._study.sampler = algorithms.sampler(settings, space, len(self.frozen()), self._prior, trust)
        if self._grid:
            for values in list(search.grid(space))[len(self.frozen()) :]:
                self._study.enqueue_trial(dict(values))
        self._running: dict[int, optuna.Trial] = {}
        self._reported: dict[int, dict[int, int]] = {}  # trial -> optimizer step -> number of the evaluation

    @property
    def inner(self) -> optuna.Study:
        """Optuna's study, for its plots."""
        return self._study

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def ask(self) -> int | None:
        """Sample the next trial, and return its number; None if all trials have started."""
        begun = sum(trial.state is not TrialState.WAITING for trial in self.frozen())
        if begun >= self.total:
            return None
        if self.space.over and not self._grid and begun == len(self.frozen()):
            self._enqueue_repeat()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask()
            search.draw(trial, self.space, self._distributions)
        number = trial.number - len(self._prior)
        self._running[number] = trial
        return number

    def _enqueue_repeat(self) -> None:
        """Enqueue a missing repeat of an earlier trial; else the repeated keys of a new one, which is then sampled."""
        groups = self._groups().values()
        self._study.enqueue_trial(repeats.missing(self.space, groups) or next(repeats.combinations(self.space)))

    def reopen(self, number: int) -> None:
        """Continue a trial that was running when the driver ended."""
        trial = self._running[number] = optuna.Trial(self._study, self.frozen()[number]._trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.draw(trial, self.space, self._distributions)  # the driver may have ended before this

    def frozen(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        if not self._prior:
            return self._all()
        return [self._renumbered(trial) for trial in self._all()[len(self._prior) :]]

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _renumbered(self, trial: FrozenTrial) -> FrozenTrial:
        own = copy.copy(trial)  # the original belongs to Optuna
        own.number = trial.number - len(self._prior)
        return own

    # ---- outcome ----------------------------------------------------------------------------------------------------

    def already_evaluated(self, number: int, steps: Sequence[int]) -> None:
        """Set the optimizer steps at which a resumed trial was evaluated before."""
        self._reported[number] = {step: index for index, step in enumerate(steps, start=1)}

    def report(self, number: int, step: int, value: float) -> bool:
        """Report an evaluation of a trial; return whether to prune it. The resource is the number of evaluations."""
        if len(self.objectives) > 1:
            return False
        reported = self._reported.setdefault(number, {})
        index = reported.setdefault(step, len(reported) + 1)
        trial = self._running[number]
        if index not in self.frozen()[number].intermediate_values:
            trial.report(value, index)
        return trial.should_prune()

    def finish(self, number: int, state: str, values: Sequence[float] | None, facts: Mapping[str, Any]) -> None:
        """Record the end of a trial: completed (with its objectives), pruned or failed."""
        trial = self._running.pop(number, None)
        if trial is not None:
            for key, value in facts.items():
                trial.set_user_attr(key, value)
        optuna_state = {name: state for state, name in STATES.items()}[state]
        self._study.tell(
            number + len(self._prior), list(values) if state == "completed" and values else None, optuna_state
        )

    def note(self, number: int, key: str, value: Any) -> None:
        """Store a fact about a running trial in the journal."""
        self._running[number].set_user_attr(key, value)

    # ---- results ----------------------------------------------------------------------------------------------------

    def best(self) -> FrozenTrial | None:
        """Return the best completed trial, or None.

        With repeats it is the best trial of the combination with the best mean; combinations whose repeats are not all
        completed are compared only if no combination is complete. With several objectives it is the Pareto-optimal
        trial that is best in the first objective.
        """
        front = self._pareto_front() if len(self.objectives) > 1 else self._completed()
        sign = 1 if self.objectives[0].direction == "min" else -1
        if self.space.over and front:
            groups = self._groups()
            complete = [trial for trial in front if groups[trial.number].complete]
            mean = min(sign * groups[trial.number].mean for trial in complete or front)
            front = [trial for trial in complete or front if sign * groups[trial.number].mean == mean]
        return min(front, key=lambda trial: (sign * trial.values[0], trial.number), default=None)

    def front(self) -> list[FrozenTrial]:
        """Return the best trial, or the Pareto-optimal trials if there are several objectives."""
        if len(self.objectives) > 1:
            return self._pareto_front()
        best = self.best()
        return [] if best is None else [best]

    def _pareto_front(self) -> list[FrozenTrial]:
        """Return the completed trials that no other one is at least as good as in all objectives and better in one."""
        trials = self._completed()
        signs = [1 if objective.direction == "min" else -1 for objective in self.objectives]
        losses = numpy.array([trial.values for trial in trials]).reshape(len(trials), len(signs)) * signs
        return [
            trial
            for trial, own in zip(trials, losses, strict=True)
            if not ((losses <= own).all(axis=1) & (losses < own).any(axis=1)).any()
        ]

    def _completed(self) -> list[FrozenTrial]:
        return [trial for trial in self.frozen() if trial.state is TrialState.COMPLETE]

    def repeats_of(self, number: int) -> Repeats | None:
        """Return the repeats to which a trial belongs; None without `sweep.over`."""
        return self._groups()[number] if self.space.over else None

    def repeats(self) -> dict[int, Repeats]:
        """Return the repeats of every trial by number; empty without `sweep.over`."""
        return self._groups() if self.space.over else {}

    def _groups(self) -> dict[int, Repeats]:
        return repeats.group(
            self.space,
            (
                (trial.number, self.values(trial), trial.values[0] if trial.state is TrialState.COMPLETE else None)
                for trial in self.frozen()
            ),
        )

    def values(self, trial: FrozenTrial) -> dict[str, Value]:
        """Return the values of a trial by key; of a waiting trial, those that it will have."""
        values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        return {axis.key: values[axis.key] for axis in self.space.axes if axis.key in values}

    def importances(self) -> dict[str, float]:
        """Return the importance of each swept key for the first objective; empty if it cannot be computed."""
        if sum(trial.state is TrialState.COMPLETE for trial in self.frozen()) < 4:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target = None if len(self.objectives) == 1 else (lambda trial: trial.values[0])
                found = optuna.importance.get_param_importances(self._study, target=target)
        except (ValueError, RuntimeError, ImportError):  # all objectives are equal, or a key has one value
            return {}
        return {key: value for key, value in found.items() if math.isfinite(value)}
