"""Builds and steps learning-rate schedules: their length, their interval, and changes by callbacks."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from launcher.config import targets
from launcher.engine.construct import construct
from launcher.engine.optim import rate_of
from launcher.errors import ConfigError, did_you_mean

INTERVALS = ("step", "epoch")
# Keys of the optimizer's groups that a schedule may write.
_WRITTEN = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum")


class Schedule:
    """Steps the schedule of a run: after optimizer steps, epochs, or evaluations.

    A callback may write a learning rate to the optimizer's groups. The ratio of that rate to the scheduled rate then
    multiplies all later rates of the group, and is part of the state.

    Args:
        section: the section `scheduler` of the configuration.
        total_steps, steps_per_epoch: number of optimizer steps of the run and of an epoch.
        monitor: the tag for ReduceLROnPlateau.
        mode: whether lower or higher values of the tag are better, `min` or `max`.

    Attributes:
        follows_metric: whether the schedule steps after evaluations, with the value of `monitor`.
        note: a note about a schedule that was rebuilt for another length, or an empty text.

    Raises:
        ConfigError: the section is invalid, or its class rejects its arguments.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: int,
        monitor: str | None = None,
        mode: str = "min",
        trust: Sequence[str] = (),
    ) -> None:
        # Warnings about the order of steps, and about arguments that torch's schedules pass to each other.
        warnings.filterwarnings("ignore", r".*(scheduler\.step|get_last_lr)\(\)", UserWarning)
        self._optimizer, self._monitor = optimizer, monitor
        self._by_epoch = interval_of(section) == "epoch"
        self._length = math.ceil(total_steps / steps_per_epoch) if self._by_epoch else total_steps
        self._scheduler: Any
        self._scheduler, self._depends_on_length = build_scheduler(section, optimizer, self._length, mode, trust)
        self.follows_metric = _takes_metric(self._scheduler)
        self._fresh = [{key: group[key] for key in _WRITTEN if key in group} for group in optimizer.param_groups]
        self._rates = self._current_rates()
        self._factors = [1.0] * len(self._rates)
        self.note = ""

    def step(self, epoch_ended: bool) -> None:
        """Step the schedule after an optimizer step, if it is due."""
        if not self.follows_metric and (epoch_ended or not self._by_epoch):
            self._advance()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Step a schedule that follows a metric after an evaluation. `metrics`: the last values of all tags."""
        if self.follows_metric and self._monitor is not None and self._monitor in metrics:
            self._advance(metrics[self._monitor])

    def try_out(self, most: int, metric: float) -> None:
        """Step as in a run, at most `most` times; OneCycleLR, which knows its length, also takes its last step."""
        for _ in range(min(most, self._length)):
            self._scheduler.step(*([metric] if self.follows_metric else []))
        if isinstance(self._scheduler, OneCycleLR) and self._length > most:
            self._scheduler.last_epoch = self._length - 1
            self._scheduler.step()

    def _advance(self, *metric: float) -> None:
        self._detect_changes()
        self._write(self._rates)  # some schedules continue from the current rate
        self._scheduler.step(*metric)
        self._rates = self._current_rates()
        self._write_scaled()

    def _detect_changes(self) -> None:
        """Record rates that a callback has set. A rate set while the scheduled rate is 0 is used for one step only."""
        for index, (rate, factor, now) in enumerate(
            zip(self._rates, self._factors, self._current_rates(), strict=True)
        ):
            if now != rate * factor and rate:
                self._factors[index] = now / rate

    def _current_rates(self) -> list[float]:
        return [rate_of(group) for group in self._optimizer.param_groups]

    def _write(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _write_scaled(self) -> None:
        self._write([rate * factor for rate, factor in zip(self._rates, self._factors, strict=True)])

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._detect_changes()
        return {
            "scheduler": self._scheduler.state_dict(),
            "length": self._length,
            "initial": self._initial(),
            "rates": self._rates,
            "factors": self._factors,
        }

    def _initial(self) -> list[float]:
        return [float(fresh.get("initial_lr", fresh["lr"])) for fresh in self._fresh]

    def load_state_dict(self, state: Mapping[str, Any], steps: int, epochs: int) -> None:
        """Restore a state, after the optimizer has restored its own.

        If the length of the schedule or the configured learning rate has changed, the schedule is replayed.

        Args:
            steps, epochs: number of steps and epochs done.

        Raises:
            ConfigError: the schedule follows a metric, so it cannot be replayed.
        """
        if "scheduler" not in state:
            state = self._upgrade(state)
        resized = self._depends_on_length and state["length"] != self._length
        saved, fresh = state["initial"], self._initial()
        self._factors = list(state["factors"])
        if resized and self.follows_metric:
            raise ConfigError(
                f"The schedule {type(self._scheduler).__name__} depends on the length of the run and on a metric, so "
                f"it cannot be rebuilt for the length {self._length} instead of {state['length']}. Resume with the "
                "former length, or start a new run with run.like."
            )
        if not self.follows_metric and (resized or fresh != saved):
            self._replay(epochs if self._by_epoch else steps)
        else:
            self._scheduler.load_state_dict(dict(state["scheduler"]))
            self._rates = [
                rate * new / old if new != old and old else rate if old else new
                for rate, new, old in zip(state["rates"], fresh, saved, strict=True)
            ]
            for group, new in zip(self._optimizer.param_groups, self._fresh, strict=True):
                group.update({"initial_lr": new["initial_lr"]} if "initial_lr" in new else {})
        self._write_scaled()
        if resized:
            unit = "epochs" if self._by_epoch else "steps"
            self.note = f"The learning rate now follows a schedule of {self._length} {unit}, not {state['length']}."

    def _upgrade(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the state of a checkpoint of launch 0.1, which is only torch's state of the scheduler."""
        lengths = (state[name] for name in ("total_steps", "T_max", "total_iters") if name in state)
        return {
            "scheduler": state,
            "length": next(lengths, self._length),
            "initial": list(state.get("base_lrs") or self._initial()),
            "rates": self._current_rates(),
            "factors": [1.0] * len(self._rates),
        }

    def _replay(self, count: int) -> None:
        for group, fresh in zip(self._optimizer.param_groups, self._fresh, strict=True):
            group.update(fresh)
        for _ in range(min(count, self._length)):
            self._scheduler.step()
        self._rates = self._current_rates()


def interval_of(section: Mapping[str, Any]) -> str:
    """Return `scheduler.interval`. Raises ConfigError if it is neither `step` nor `epoch`."""
    interval = section.get("interval")
    if interval not in (None, *INTERVALS):
        raise ConfigError(
            f"scheduler.interval is {interval!r}, but must be step or epoch.{did_you_mean(str(interval), INTERVALS)}",
            key="scheduler.interval",
        )
    return interval or INTERVALS[0]


def _takes_metric(scheduler: LRScheduler) -> bool:
    """Whether the method `step` requires a metric, like that of ReduceLROnPlateau."""
    parameters = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


# ---- building -------------------------------------------------------------------------------------------------------


def build_scheduler(
    section: Mapping[str, Any], optimizer: Optimizer, length: int, mode: str = "min", trust: Sequence[str] = ()
) -> tuple[LRScheduler, bool]:
    """Build the schedule of a section with its nested schedules. Without a `_target_` the rate is constant.

    Args:
        length: length of the run, in steps or epochs.

    Returns:
        The schedule, and whether an argument depends on the length of the run.
    """
    if not section.get("_target_"):
        return LambdaLR(optimizer, _constant), False
    targets.check_signature(section, "scheduler", trust)
    plain = {key: value for key, value in section.items() if key != "interval"}
    complete = _with_lengths(plain, length, mode, trust)
    scheduler = construct(complete, "scheduler", trust, optimizer=optimizer)
    return scheduler, complete != _with_lengths(plain, length + 1, mode, trust)


def _constant(step: int) -> float:
    return 1.0


def _with_lengths(section: Mapping[str, Any], length: int, mode: str, trust: Sequence[str]) -> dict[str, Any]:
    """Return the section with the unset lengths filled in, also in nested sections."""
    kind = targets.resolve(section["_target_"], "scheduler", trust)
    given = {name: length for name in _lengths_of(kind, section) if section.get(name) is None}
    if issubclass(kind, ReduceLROnPlateau) and "mode" not in section:
        given["mode"] = mode  # type: ignore[assignment]
    segments = _segments(section, length) if issubclass(kind, SequentialLR) else []

    def complete(value: Any, length: int) -> Any:
        if isinstance(value, Mapping):
            if "_target_" in value:
                return _with_lengths(value, length, mode, trust)
            return {key: complete(item, length) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [complete(item, length) for item in value]
        return value

    whole = {key: complete(value, length) for key, value in section.items() if key not in given}
    if segments and isinstance(section.get("schedulers"), (list, tuple)):
        whole["schedulers"] = [complete(one, part) for one, part in zip(section["schedulers"], segments, strict=False)]
        whole["schedulers"] += [complete(one, length) for one in section["schedulers"][len(segments) :]]
    return {**whole, **given}


def _segments(section: Mapping[str, Any], length: int) -> list[int]:
    """Return the lengths of the segments between the milestones of a SequentialLR."""
    milestones = section.get("milestones")
    if not isinstance(milestones, (list, tuple)) or not all(isinstance(one, int) for one in milestones):
        return []
    ends = [*milestones, max(length, *milestones, 1)] if milestones else [length]
    return [max(1, end - start) for start, end in zip([0, *milestones], ends, strict=True)]


def _lengths_of(kind: type, section: Mapping[str, Any]) -> list[str]:
    """Return the parameters of a schedule class that mean the length of the run."""
    parameters = inspect.signature(kind).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = []
    in_epochs = all(section.get(name) is not None for name in ("epochs", "steps_per_epoch"))
    if "total_steps" in parameters or (open_ended and issubclass(kind, OneCycleLR)):
        found += [] if in_epochs else ["total_steps"]
    needed = "T_max" in parameters and parameters["T_max"].default is inspect.Parameter.empty
    if needed or (issubclass(kind, CosineAnnealingLR) and ("T_max" in parameters or open_ended)):
        found.append("T_max")
    if issubclass(kind, PolynomialLR) and ("total_iters" in parameters or open_ended):
        found.append("total_iters")
    return found
