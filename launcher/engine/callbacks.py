"""What happens beside training: your own code at certain moments, an average of the weights, an early end.

A callback is any object with some of these methods, all of them called on every rank:

    on_start(run)          once, before the first step of this process; what a resumed run had saved is loaded already
    on_step(run)           after every optimizer step
    on_evaluate(run)       after every evaluation, whose values are in `run.metrics`
    on_log(run, step, values)  after every step that has values to write, with these values by tag: those of the model
                           are the means over all workers; those of the machine and of `run.log` are this rank's, and
                           rank 0's are written
    on_end(run)            when the run has ended in order: completed or stopped, not failed
    weights()              {parameter's name: tensor}: what is evaluated, exported and begun with in the place of the
                           trained weights; one callback may have it
    state_dict()           what a checkpoint keeps of it: tensors and plain values, the same on every rank
    load_state_dict(state) takes that back, before `on_start`

`run` is a `Run`. Constructors run at the start check too, in another process: what opens files belongs in `on_start`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.config import Job, targets
from launcher.engine.construct import construct
from launcher.engine.failures import traceback_of_user
from launcher.engine.metrics import RESERVED
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.kinds.base import DEFAULT, kind_of
from launcher.errors import ConfigError, LaunchError, UserCodeError, did_you_mean


class Run:
    """What a callback is given.

    Attributes:
        model, optimizer: those that are trained. The model is the user's own, not wrapped.
        directory: the run on disk.
        rank, world_size, device: of this process. Files and services are rank 0's business.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        runtime: Runtime,
        directory: Path,
        total_steps: int,
    ) -> None:
        self.model, self.optimizer, self.directory, self.total_steps = model, optimizer, directory, total_steps
        self._progress, self._runtime = progress, runtime
        self._logged: dict[str, float] = {}
        self._reason: str | None = None

    @property
    def rank(self) -> int:
        return self._runtime.rank

    @property
    def world_size(self) -> int:
        return self._runtime.world_size

    @property
    def device(self) -> torch.device:
        return self._runtime.device

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._progress.epoch

    @property
    def samples(self) -> int:
        """Samples used so far, over all workers."""
        return self._progress.samples

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every tag that was logged, the same on every rank."""
        return dict(self._progress.metrics)

    def log(self, values: Mapping[str, float]) -> None:
        """Write {tag: value} with this step to TensorBoard and `metrics.jsonl`. The values of rank 0 are used.

        Raises:
            UserCodeError: launch itself logs a tag of this name.
        """
        for tag in map(str, values):
            if tag in self._progress.metrics or tag.removeprefix("train/").removeprefix("val/") in RESERVED:
                raise UserCodeError(
                    f'run.log: "{tag}" is a name that launch itself logs, and one of the two values would be lost. '
                    f'Choose another name, such as "own/{tag}".',
                    "",
                )
        self._logged.update({str(tag): float(value) for tag, value in values.items()})

    def stop(self, reason: str) -> None:
        """End the run in order: after this step when asked in `on_evaluate`, after the next one in `on_step`.

        It is completed then, and result.json gives the reason. It is enough that one rank asks.
        """
        self._reason = self._reason or str(reason)


class Callbacks:
    """The callbacks of a job, called in their order.

    Args:
        members: the built objects, by name.
    """

    def __init__(self, members: Mapping[str, Any], run: Run, runtime: Runtime) -> None:
        self._members, self._run, self._runtime = dict(members), run, runtime
        self._average = next((name for name, member in members.items() if hasattr(member, "weights")), None)

    def __bool__(self) -> bool:
        return bool(self._members)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call `hook` of all that have it, with the run and the further arguments.

        Raises:
            UserCodeError: one of them raised; says which.
        """
        for name, member in self._members.items():
            function = getattr(member, hook, None)
            if function is not None:
                with _blamed(f"callbacks.{name}.{hook}"):
                    function(self._run, *arguments)

    @property
    def wants_to_stop(self) -> bool:
        """Whether a callback of this rank has asked to stop."""
        return self._run._reason is not None

    def agree_to_stop(self) -> str | None:
        """Return the reason to stop that the first rank with one has, or None; a collective."""
        if not self._members:
            return None
        return next((reason for reason in self._runtime.gather(self._run._reason) if reason is not None), None)

    def take_logged(self) -> dict[str, float]:
        """Return what was logged since the last call."""
        logged, self._run._logged = self._run._logged, {}
        return logged

    # ---- averaged weights -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor] | None:
        """Return a whole state dict with what is evaluated in the place of the trained weights; None without."""
        averages = self._averages()
        return {**self._run.model.state_dict(), **averages} if averages else None

    def _averages(self) -> dict[str, Tensor]:
        """Return what a callback names, under every name that the model's state dict has for it (tied weights)."""
        name = self._average
        if name is None:
            return {}
        with _blamed(f"callbacks.{name}.weights"):
            given = dict(self._members[name].weights())
        parameters = dict(self._run.model.named_parameters())
        if unknown := sorted(given.keys() - parameters.keys()):
            raise UserCodeError(f"callbacks.{name}.weights: {unknown[0]} is no parameter of the model.", "")
        by_parameter = {id(parameters[key]): value for key, value in given.items()}
        own = self._run.model.state_dict(keep_vars=True)
        return {key: by_parameter[id(value)] for key, value in own.items() if id(value) in by_parameter}

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Put the weights that are evaluated into the model, and the trained ones back afterwards."""
        chosen = self._averages()
        own = self._run.model.state_dict()
        kept = {name: own[name].clone() for name in chosen}
        _copy_all(chosen, own)
        try:
            yield
        finally:
            _copy_all(kept, own)

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {}
        for name, member in self._members.items():
            if hasattr(member, "state_dict"):
                with _blamed(f"callbacks.{name}.state_dict"):
                    state[name] = member.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every callback its own; one that is new begins anew, and what belongs to none is left."""
        for name, member in self._members.items():
            if name in state and hasattr(member, "load_state_dict"):
                with _blamed(f"callbacks.{name}.load_state_dict"):
                    member.load_state_dict(state[name])


@torch.no_grad()
def _copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    try:
        yield
    except LaunchError:
        raise
    except Exception as error:
        raise UserCodeError(f"{where}: {type(error).__name__}: {error}", traceback_of_user(error)) from error


def build_callbacks(job: Job) -> dict[str, Any]:
    """Build the callbacks of the configuration, by name.

    Raises:
        ConfigError, TrustError: a section names no class of this kind, or an argument that it does not take; two name
            the weights that are evaluated.
        UserCodeError: a constructor raised.
    """
    members = {}
    for name, section in job.callbacks.items():
        if section is None:  # taken out of what an overlay had put in
            continue
        where = f"callbacks.{name}"
        targets.check_signature(section, "callback", job.trust, at=where)
        with _blamed(where):
            members[name] = construct(section, "callback", job.trust, at=where)
    averages = [name for name, member in members.items() if hasattr(member, "weights")]
    if len(averages) > 1:
        raise ConfigError(f"callbacks: {' and '.join(averages)} both say which weights are evaluated. Choose one.")
    if averages and kind_of(job.strategy, job.trust).diverges:
        raise ConfigError(
            f"callbacks.{averages[0]} averages the weights, and with strategy={job.strategy.name} every worker has "
            "weights of its own, whose own average is evaluated already. Leave the callback out "
            f"(~callbacks.{averages[0]}), or use strategy={DEFAULT}."
        )
    return members


def check_callbacks(job: Job, tags: list[str]) -> None:
    """Raise what `build_callbacks` does, and ConfigError where early stopping watches a tag that does not exist."""
    for name, member in build_callbacks(job).items():
        if isinstance(member, EarlyStopping) and member.monitor not in tags:
            raise ConfigError(
                f"callbacks.{name}.monitor={member.monitor} is no tag of this job; there are {', '.join(tags)}."
                f"{did_you_mean(str(member.monitor), tags)}"
            )


# ---- ours -----------------------------------------------------------------------------------------------------------


class Ema:
    """An exponential moving average of the weights (Polyak and Juditsky 1992), evaluated in their place.

    After step n each average moves by 1 - d towards its weight, d being the smaller of `decay` and (1 + n) / (10 + n):
    early averages forget the first, random weights soon (as TensorFlow's ExponentialMovingAverage does). Parameters
    are averaged, in float32 at least; buffers are the model's own. The same operations on every rank.

    Args:
        decay: 0 to 1, 1 excluded; about 1 - 1 / the number of steps that the average reaches back.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay}: it must lie between 0 and 1, 1 excluded, such as 0.999.")
        self.decay = decay
        self._updates = 0
        self._averages: dict[str, Tensor] = {}
        self._parameters: list[nn.Parameter] = []
        self._loaded: Mapping[str, Any] | None = None

    @torch.no_grad()
    def on_start(self, run: Run) -> None:
        named = {name: p for name, p in run.model.named_parameters() if p.is_floating_point() or p.is_complex()}
        self._parameters = list(named.values())
        self._averages = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for name, p in named.items()
        }
        if self._loaded is not None:
            saved = self._loaded["averages"]
            for name in self._averages.keys() & saved.keys():
                _copy_into(self._averages[name], saved[name])
            self._updates, self._loaded = int(self._loaded["updates"]), None

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        self._updates += 1
        weight = 1 - min(self.decay, (1 + self._updates) / (10 + self._updates))
        averages = list(self._averages.values())
        weights = [p.to(average.dtype) for p, average in zip(self._parameters, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, weight)

    def weights(self) -> dict[str, Tensor]:
        return dict(self._averages)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loaded = state


def _copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # with SymPy behind it: half a second

    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


class EarlyStopping:
    """Ends a run whose evaluations no longer improve; result.json gives the reason `early_stopping`.

    Args:
        patience: evaluations in a row without a better value that are waited for.
        min_delta: by how much a value must be better to count, at least 0.
        monitor: the tag; by default that of `checkpoint.monitor`.
        mode: `min` or `max`; by default `checkpoint.mode`.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, monitor: str | None = "val/loss", mode: str = "min"
    ) -> None:
        if patience < 1 or not 0 <= min_delta < math.inf or mode not in ("min", "max"):
            raise ConfigError(
                f"callbacks.early_stopping: patience={patience}, min_delta={min_delta}, mode={mode}; needed are a "
                "patience of at least 1 evaluation, a min_delta of at least 0, and min or max."
            )
        self.patience, self.min_delta, self.monitor, self.mode = patience, min_delta, monitor, mode
        self._best: float | None = None
        self._waited = 0

    def on_evaluate(self, run: Run) -> None:
        value = run.metrics.get(str(self.monitor), math.nan)
        sign = 1 if self.mode == "min" else -1
        better = self._best is None or sign * value < sign * self._best - self.min_delta
        if better and math.isfinite(value):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            run.stop("early_stopping")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited = state["best"], int(state["waited"])
