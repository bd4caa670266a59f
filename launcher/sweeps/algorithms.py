"""The samplers and pruners of a sweep: Optuna's by name, the user's own by `_target_`, with their options."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from optuna import pruners, samplers
from optuna.pruners import BasePruner
from optuna.samplers import BaseGASampler, BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from launcher.config import SweepConfig, targets
from launcher.errors import ConfigError, did_you_mean
from launcher.sweeps.space import ChoiceAxis, SearchSpace

Kind = Literal["sampler", "pruner"]


class RebuiltCmaEs(CmaEsSampler):
    """Optuna's CMA-ES without the pickled optimizer in the journal, which could execute code when it is read.

    The state follows from the trials of each generation, and is recomputed from them for every draw.
    """

    def _restore_optimizer(self, completed_trials: list[Any]) -> None:
        self._completed = completed_trials

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        optimizer = super()._init_optimizer(trans, direction)
        sign = 1 if direction == StudyDirection.MINIMIZE else -1
        size = optimizer.population_size
        while len(found := self._get_solution_trials(self._completed, optimizer.generation)) >= size:
            optimizer.tell([(trans.transform(trial.params), sign * (trial.value or 0.0)) for trial in found[:size]])
        return optimizer


# Not offered by name: a grid tries every combination already, and these two end a study that launch does not loop over.
# PartialFixedSampler is a fixed word of the command line.
_NOT_OFFERED = ("GridSampler", "BruteForceSampler", "PartialFixedSampler")
_SHORT: dict[Kind, dict[str, type]] = {
    "sampler": {
        "grid": RandomSampler,  # not used: all trials are enqueued with their values
        "random": RandomSampler,
        "tpe": samplers.TPESampler,
        "gp": GPSampler,
        "cmaes": RebuiltCmaEs,
        "nsga2": samplers.NSGAIISampler,
    },
    "pruner": {
        "none": pruners.NopPruner,
        "asha": pruners.SuccessiveHalvingPruner,
        "hyperband": pruners.HyperbandPruner,
        "median": pruners.MedianPruner,
    },
}


def known(kind: Kind) -> dict[str, type]:
    """Return the samplers or pruners by name: the short names of launch, and Optuna's names of its classes."""
    module, base = (samplers, BaseSampler) if kind == "sampler" else (pruners, BasePruner)
    classes = {name: getattr(module, name) for name in module.__all__ if name not in _NOT_OFFERED}
    own = {"CmaEsSampler": RebuiltCmaEs} if kind == "sampler" else {}
    concrete = {
        name: found
        for name, found in classes.items()
        if isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found)
    }
    return {**_SHORT[kind], **concrete, **own}


def name_of(chosen: Any) -> str:
    """Return the name of `sweep.sampler` or `sweep.pruner` for messages."""
    return str(chosen["_target_"]).rpartition(".")[2] if isinstance(chosen, Mapping) else str(chosen)


def class_of(kind: Kind, chosen: Any, trust: Sequence[str] = ()) -> type:
    """Return the class that `sweep.sampler` or `sweep.pruner` names.

    Raises:
        ConfigError: there is no such class.
        TrustError: `trust` does not name the package of the user's own class.
    """
    if isinstance(chosen, Mapping):
        return targets.resolve(chosen["_target_"], kind, trust)
    classes = known(kind)
    if chosen not in classes:
        raise ConfigError(
            f"sweep.{kind} is {chosen!r}, but must be one of {', '.join(classes)}, or a mapping with the `_target_` of "
            f"your own class.{did_you_mean(str(chosen), list(classes))}"
        )
    return classes[chosen]


def sampler(
    settings: SweepConfig,
    space: SearchSpace,
    drawn: int,
    prior: Sequence[FrozenTrial] = (),
    trust: Sequence[str] = (),
) -> BaseSampler:
    """Return the sampler of a sweep.

    Args:
        drawn: number of trials so far, so that a resumed sweep does not sample the same values again.
        prior: trials of another sweep in the study, from which the sampler learns.
        trust: the packages whose classes may be used.

    Raises:
        ConfigError: the sampler or an option is unknown, or the sampler does not support the search space.
        TrustError: `trust` does not name the package of the user's own class.
    """
    found = class_of("sampler", settings.sampler, trust)
    if issubclass(found, CmaEsSampler) and all(isinstance(a, ChoiceAxis) and a.step is None for a in space.axes):
        raise ConfigError("sweep=cmaes searches over numbers, but only choices are swept. Use sweep=tpe or sweep=grid.")
    defaults: dict[str, Any] = {"seed": (settings.seed + 1_000_003 * drawn) % 2**32}
    if issubclass(found, BaseGASampler) and settings.trials:
        # With Optuna's default of 50, a sweep of 40 trials would only have its first, random generation.
        defaults["population_size"] = max(4, min(50, settings.trials // 4))
    if issubclass(found, CmaEsSampler) and prior:
        defaults["source_trials"] = list(prior)
    built: BaseSampler = _build("sampler", settings.sampler, settings.sampler_options, defaults, trust)
    return built


def pruner(settings: SweepConfig, evaluations: int | None, trust: Sequence[str] = ()) -> BasePruner:
    """Return the pruner of a sweep, whose resource is the number of evaluations.

    Args:
        evaluations: number of evaluations of a complete trial, None if unknown.
        trust: the packages whose classes may be used.

    Raises:
        ConfigError: the pruner or an option is unknown.
        TrustError: `trust` does not name the package of the user's own class.
    """
    least, reduction = settings.min_evaluations, settings.reduction
    defaults: dict[str, Any] = {}
    if settings.pruner in ("asha", "hyperband"):
        defaults = {"min_resource": least, "reduction_factor": reduction}
    if settings.pruner == "hyperband":
        defaults["max_resource"] = "auto" if evaluations is None else max(evaluations, least)
    if settings.pruner == "median":
        defaults = {"n_warmup_steps": least}
    built: BasePruner = _build("pruner", settings.pruner, settings.pruner_options, defaults, trust)
    return built


def learns_from_others(settings: SweepConfig, trust: Sequence[str] = ()) -> bool:
    """Return whether the sampler uses trials that it did not sample itself (`sweep.warm_start`)."""
    return not issubclass(class_of("sampler", settings.sampler, trust), (RandomSampler, QMCSampler, BaseGASampler))


def supports_objectives(settings: SweepConfig, trust: Sequence[str] = ()) -> bool:
    """Return whether the sampler supports several objectives."""
    return not issubclass(class_of("sampler", settings.sampler, trust), (CmaEsSampler, GPSampler))


def _build(
    kind: Kind, chosen: Any, options: Mapping[str, Any], defaults: Mapping[str, Any], trust: Sequence[str]
) -> Any:
    """Instantiate a sampler or a pruner. Options replace the defaults that its class accepts."""
    found, name = class_of(kind, chosen, trust), name_of(chosen)
    beside = chosen.items() if isinstance(chosen, Mapping) else ()
    given = {**{str(key): value for key, value in beside if key != "_target_"}, **options}
    parameters = inspect.signature(found).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    accepted = [key for key, one in parameters.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    for key in given:
        if key not in accepted and not open_ended:
            raise ConfigError(
                f"sweep.{kind}_options.{key} is not an option of {name}.{did_you_mean(key, accepted)} "
                f"It has {', '.join(accepted) or 'no options'}."
            )
    keys = {key: value for key, value in defaults.items() if key in accepted}
    keys |= {key: _built_option(key, value, trust) for key, value in given.items()}
    missing = [key for key in accepted if key not in keys and parameters[key].default is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"{name} needs the option {missing[0]}. Add sweep.{kind}_options.{missing[0]}=VALUE.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return found(**keys)
    except ImportError as error:
        raise ConfigError(
            f"sweep.{kind}={name} needs a package that is not installed: {error}. Install it, or use another {kind}."
        ) from error
    except Exception as error:  # the class may be the user's own
        text = str(error).rstrip(".")
        raise ConfigError(
            f"sweep.{kind}={name} rejected its options ({type(error).__name__}: {text}). Change "
            f"sweep.{kind}_options, which are {dict(given)}."
        ) from error


def _built_option(key: str, value: Any, trust: Sequence[str]) -> Any:
    """Return an option: another sampler or pruner by name or `_target_`, such as `wrapped_pruner`, or plain data."""
    if isinstance(value, Mapping) and "_target_" in value and not key.endswith(("sampler", "pruner")):
        return targets.build(value, "option", trust)
    for kind in ("sampler", "pruner"):
        if key.endswith(kind) and (isinstance(value, str) or (isinstance(value, Mapping) and "_target_" in value)):
            return _build(kind, value, {}, {}, trust)
    return value
