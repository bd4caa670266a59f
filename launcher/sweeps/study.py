"""One sweep's Optuna study in `study.journal`: what was drawn, what came of it, and what is left to do."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from launcher.config import SweepConfig
from launcher.errors import RunError
from launcher.sweeps import search
from launcher.sweeps.syntax import SearchSpace, Value

JOURNAL = "study.journal"
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
    """A tag that the sweep makes as small (`min`) or as large (`max`) as it can."""

    tag: str
    direction: str

    @property
    def for_optuna(self) -> str:
        return "MINIMIZE" if self.direction == "min" else "MAXIMIZE"


@dataclass(frozen=True)
class SweepRecord:
    """What the journal holds of how a sweep was started."""

    words: tuple[str, ...]
    config_dir: str | None


def quiet() -> None:
    """Optuna tells of each trial on standard error, and of what is experimental in it; we say what there is to say."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("cmaes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")


def read_record(directory: Path) -> SweepRecord:
    """Return how the sweep in `directory` was started.

    Raises:
        RunError: its journal cannot be read.
    """
    attributes = _load(directory).user_attrs
    words, config_dir = attributes.get("words", []), attributes.get("config_dir")
    if (
        not isinstance(words, list)
        or len(words) > _MOST_WORDS
        or not all(isinstance(word, str) for word in words)
        or not isinstance(config_dir, str | None)
    ):
        raise RunError(f"{directory / JOURNAL} is damaged: it does not hold the words of a sweep. Restore it.")
    return SweepRecord(tuple(words), config_dir)


def _load(directory: Path, **options: Any) -> optuna.Study:
    quiet()
    path = directory / JOURNAL
    try:
        return optuna.load_study(study_name=directory.name, storage=_storage(path), **options)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, OSError) as error:
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Restore it, or start the sweep under another "
            "run.name."
        ) from error


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def repair(directory: Path) -> None:
    """Take away what a killed driver has left: half a line at the journal's end, and the journal's lock."""
    path = directory / JOURNAL
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    with suppress(FileNotFoundError):
        (directory / f"{JOURNAL}.lock").unlink()


class Study:
    """Draws trials and keeps their outcome. Everything is in the journal when a method returns.

    Args:
        total: how many trials there are in all; of a grid, all combinations.
        evaluations: how many evaluations a whole trial has, None where that is not known beforehand.
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
    ) -> None:
        quiet()
        self.space, self.total, self.objectives = space, total, tuple(objectives)
        self._grid = settings.sampler == "grid"
        self._distributions = search.distributions(space, self._grid)
        pruner = search.pruner(settings, evaluations)
        if start is None:
            self._study = _load(directory, pruner=pruner)
        else:
            self._study = optuna.create_study(
                study_name=directory.name,
                storage=_storage(directory / JOURNAL),
                directions=[StudyDirection[objective.for_optuna] for objective in objectives],
                pruner=pruner,
            )
            self._study.set_user_attr("words", list(start.words))
            self._study.set_user_attr("config_dir", start.config_dir)
        self._study.sampler = search.sampler(settings, space, len(self.frozen()))
        if self._grid:
            for values in list(search.grid(space))[len(self.frozen()) :]:
                self._study.enqueue_trial(dict(values))
        self._running: dict[int, optuna.Trial] = {}
        self._reported: dict[int, dict[int, int]] = {}  # trial -> optimizer step -> number of the evaluation

    @property
    def inner(self) -> optuna.Study:
        """Optuna's own study, for its pictures."""
        return self._study

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def ask(self) -> optuna.Trial | None:
        """Return the next trial, or None when there is none."""
        begun = sum(trial.state is not TrialState.WAITING for trial in self.frozen())
        if begun >= self.total:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        self._running[trial.number] = trial
        return trial

    def again(self, number: int) -> optuna.Trial:
        """Return a trial that was running when the driver went away, to be continued."""
        frozen = self.frozen()[number]
        self._running[number] = optuna.Trial(self._study, frozen._trial_id)
        return self._running[number]

    def frozen(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        return self._study.get_trials(deepcopy=False)

    # ---- outcome ----------------------------------------------------------------------------------------------------

    def already_evaluated(self, number: int, steps: Sequence[int]) -> None:
        """Note at which optimizer steps a trial that is continued was evaluated before."""
        self._reported[number] = {step: index for index, step in enumerate(steps, start=1)}

    def report(self, number: int, step: int, value: float) -> bool:
        """Note an evaluation; tell whether the trial should be pruned. The resource is the number of evaluations."""
        if len(self.objectives) > 1:
            return False
        reported = self._reported.setdefault(number, {})
        index = reported.setdefault(step, len(reported) + 1)
        trial = self._running[number]
        if index not in self.frozen()[number].intermediate_values:
            trial.report(value, index)
        return trial.should_prune()

    def finish(self, number: int, state: str, values: Sequence[float] | None, facts: Mapping[str, Any]) -> None:
        """Record how a trial ended: completed (with its objectives), pruned or failed."""
        trial = self._running.pop(number, None)
        if trial is not None:
            for key, value in facts.items():
                trial.set_user_attr(key, value)
        optuna_state = {name: state for state, name in STATES.items()}[state]
        self._study.tell(number, list(values) if state == "completed" and values else None, optuna_state)

    def note(self, number: int, key: str, value: Any) -> None:
        self._running[number].set_user_attr(key, value)

    # ---- what is best -----------------------------------------------------------------------------------------------

    def best(self) -> FrozenTrial | None:
        """Return the best completed trial; of several objectives, the one of the front that is best in the first."""
        front = self.front()
        if not front:
            return None
        sign = 1 if self.objectives[0].direction == "min" else -1
        return min(front, key=lambda trial: (sign * trial.values[0], trial.number))

    def front(self) -> list[FrozenTrial]:
        """Return the best trial, or the trials of the Pareto front where there are several objectives."""
        if not any(trial.state is TrialState.COMPLETE for trial in self.frozen()):
            return []
        if len(self.objectives) > 1:
            return self._study.best_trials
        return [self._study.best_trial]

    def values(self, trial: FrozenTrial) -> dict[str, Value]:
        """Return a trial's parameters, of a trial that waits those that it will have."""
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        return {axis.key: params[axis.key] for axis in self.space.axes if axis.key in params}

    def importances(self) -> dict[str, float]:
        """Return how much each swept key matters for the first objective; empty where that cannot be known."""
        if sum(trial.state is TrialState.COMPLETE for trial in self.frozen()) < 4:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target = None if len(self.objectives) == 1 else (lambda trial: trial.values[0])
                found = optuna.importance.get_param_importances(self._study, target=target)
        except (ValueError, RuntimeError, ImportError):  # all trials alike, or a key with one value
            return {}
        return {key: value for key, value in found.items() if math.isfinite(value)}
