"""Prior trials of a sweep (`sweep.warm_start`): the completed trials of another sweep, from which a sampler learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from launcher import runs
from launcher.errors import ConfigError, RunError, did_you_mean
from launcher.jobs.remote.control import fetch_files
from launcher.runs import RunDirectory
from launcher.sweeps import study
from launcher.sweeps.space import SearchSpace


@dataclass(frozen=True)
class WarmStart:
    """The trials of the sweep `name` that are within the search space of another sweep.

    Attributes:
        completed: number of completed trials of that sweep, within the search space or not.
    """

    name: str
    trials: tuple[FrozenTrial, ...]
    completed: int

    def summary(self) -> str:
        """Return a phrase for the summary of the sweep."""
        return f"warm start from {len(self.trials)} of {self.completed} trials of {self.name}"


def read(
    root: Path,
    name: str,
    space: SearchSpace,
    distributions: Mapping[str, BaseDistribution],
    objectives: Sequence[study.Objective],
) -> WarmStart:
    """Return the completed trials of the sweep `name` that are within a search space.

    Args:
        root: the run root that contains the sweep.

    Raises:
        ConfigError: the sweep has other swept keys, another objective, or no trial within the search space.
        RunError: there is no such sweep, or its journal cannot be read.
    """
    directory = runs.find(root, name)
    if directory.is_sent and not (directory.path / study.JOURNAL).is_file():
        fetch_files(directory)
    if not (directory.path / study.JOURNAL).is_file():
        raise RunError(f"sweep.warm_start={name}: {name} is a single run. Name a sweep, which launch -m created.")
    other = study.load(directory.path)
    _check_objectives(name, _objectives(other, directory), objectives)
    completed = [trial for trial in other.get_trials(deepcopy=False) if trial.state is TrialState.COMPLETE]
    if not completed:
        raise ConfigError(
            f"sweep.warm_start={name}: no trial of {name} is completed. Resume it (launch -m run.name={name} "
            "run.resume=true), or remove sweep.warm_start.",
            key="sweep.warm_start",
        )
    _check_keys(name, completed, space)
    trials = [trial for one in completed if (trial := _converted(one, space, distributions, name)) is not None]
    if not trials:
        raise ConfigError(
            f"sweep.warm_start={name}: no completed trial of {name} is within the search space of this sweep. Sweep "
            f"{', '.join(space.keys)} over values that include those of {name}, or remove sweep.warm_start.",
            key="sweep.warm_start",
        )
    return WarmStart(name, tuple(trials), len(completed))


def _objectives(other: Any, directory: RunDirectory) -> list[study.Objective]:
    """Return the objectives of a sweep. The journals of older versions have no tags; result.json has the first one."""
    tags = other.user_attrs.get("tags") or [(directory.result().get("best") or {}).get("tag")]
    return [study.Objective.of_optuna(str(tag), one) for tag, one in zip(tags, other.directions, strict=False)]


def _check_objectives(name: str, theirs: Sequence[study.Objective], ours: Sequence[study.Objective]) -> None:
    if list(theirs) != list(ours):
        described = [", ".join(f"{one.direction} {one.tag}" for one in each) for each in (theirs, ours)]
        raise ConfigError(
            f"sweep.warm_start={name}: the objective of {name} is {described[0]}, but this sweep has {described[1]}. "
            "Set sweep.metric and sweep.direction to the same objective, or remove sweep.warm_start.",
            key="sweep.warm_start",
        )


def _check_keys(name: str, completed: Sequence[FrozenTrial], space: SearchSpace) -> None:
    theirs = dict.fromkeys(key for trial in completed for key in trial.params)
    for key in theirs:
        if key not in space.keys:
            raise ConfigError(
                f"sweep.warm_start={name}: {name} sweeps over {key}, but this sweep does not."
                f"{did_you_mean(key, space.keys)} Sweep over the same keys ({', '.join(theirs)}), or remove "
                "sweep.warm_start.",
                key="sweep.warm_start",
            )
    for key in space.keys:
        if key not in theirs and key not in space.conditions:
            raise ConfigError(
                f"sweep.warm_start={name}: this sweep has the key {key}, but {name} does not sweep over it. Sweep over "
                f"the same keys ({', '.join(theirs)}), or remove sweep.warm_start.",
                key="sweep.warm_start",
            )


def _converted(
    trial: FrozenTrial, space: SearchSpace, distributions: Mapping[str, BaseDistribution], name: str
) -> FrozenTrial | None:
    """Return a completed trial with the distributions of a search space, None if a value is outside of them."""
    if space.active(trial.params).keys() != {key for key in space.keys if space.is_active(key, trial.params)}:
        return None
    params = {}
    for key, value in space.active(trial.params).items():
        try:
            internal = distributions[key].to_internal_repr(value)
        except (ValueError, TypeError):  # not one of the choices, or a text where numbers are swept
            return None
        if not distributions[key]._contains(internal):
            return None
        params[key] = distributions[key].to_external_repr(internal)
    return create_trial(
        values=trial.values,
        params=params,
        distributions={key: distributions[key] for key in params},
        user_attrs={study.PRIOR: name},
    )
