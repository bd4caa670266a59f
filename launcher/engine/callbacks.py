"""The callback interface, and the callbacks that come with launch: `Ema` and `EarlyStopping`.

A callback is an object with any of these methods. All of them are called on every rank:

    on_start(run)          once per process, before its first step and after the state of a resumed run is loaded
    on_step(run)           after every optimizer step
    on_evaluate(run)       after every evaluation; `run.metrics` has the results
    on_log(run, step, values)  after every step that writes values, with these values by tag. The values of the model
                           are means over all workers; those of the machine and of `run.log` are this rank's, and only
                           rank 0's are written
    on_end(run)            when the run has completed or been stopped; not after a failure
    weights()              {parameter's name: tensor}: weights that are evaluated, exported and loaded instead of the
                           trained weights. At most one callback may have this method
    state_dict()           returns the state for a checkpoint: tensors and plain values, the same on every rank
    load_state_dict(state) restores that state, before `on_start`

`run` is a `Run`. The start check calls constructors too, in another process, so open files and connections in
`on_start`.
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
    """The run that a callback belongs to.

    Attributes:
        model: the user's model, not wrapped.
        optimizer: the optimizer of the run.
        directory: the run's directory.
        rank, world_size, device: of this process. Write files and call services on rank 0 only.
        total_steps: number of optimizer steps of the whole run.
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
        """The number of optimizer steps done."""
        return self._progress.step

    @property
    def epoch(self) -> int:
        """The number of epochs done."""
        return self._progress.epoch

    @property
    def samples(self) -> int:
        """The number of samples used so far by all workers."""
        return self._progress.samples

    @property
    def metrics(self) -> dict[str, float]:
        """The last logged value of every tag, the same on every rank."""
        return dict(self._progress.metrics)

    def log(self, values: Mapping[str, float]) -> None:
        """Log {tag: value} at this step to TensorBoard, `metrics.jsonl` and the other sinks. Rank 0's values are used.

        Raises:
            UserCodeError: launch itself logs a tag with this name.
        """
        for tag in map(str, values):
            if tag in self._progress.metrics or tag.removeprefix("train/").removeprefix("val/") in RESERVED:
                raise UserCodeError(
                    f'run.log: "{tag}" is a name that launch itself logs, so one of the values would be lost. '
                    f'Choose another name, such as "own/{tag}".',
                    "",
                )
        self._logged.update({str(tag): float(value) for tag, value in values.items()})

    def stop(self, reason: str) -> None:
        """End the run: after this step if called in `on_evaluate`, after the next step if called in `on_step`.

        The status of the run is then `completed`, with the reason in result.json. A call on one rank is sufficient.
        """
        self._reason = self._reason or str(reason)


class Callbacks:
    """Calls the callbacks of a job in their configured order.

    Args:
        members: the built objects, by name.
    """

    def __init__(self, members: Mapping[str, Any], run: Run, runtime: Runtime) -> None:
        self._members, self._run, self._runtime = dict(members), run, runtime
        self._average = next((name for name, member in members.items() if hasattr(member, "weights")), None)

    def __bool__(self) -> bool:
        return bool(self._members)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call the method `hook` of all callbacks that have it, with the run and the further arguments.

        Raises:
            UserCodeError: a callback raised an exception; names the callback.
        """
        for name, member in self._members.items():
            function = getattr(member, hook, None)
            if function is not None:
                with _user_code(f"callbacks.{name}.{hook}"):
                    function(self._run, *arguments)

    @property
    def wants_to_stop(self) -> bool:
        """Whether a callback has called `run.stop` on this rank."""
        return self._run._reason is not None

    def agree_to_stop(self) -> str | None:
        """Return the reason of the first rank that called `run.stop`, or None. A collective."""
        if not self._members:
            return None
        return next((reason for reason in self._runtime.gather(self._run._reason) if reason is not None), None)

    def take_logged(self) -> dict[str, float]:
        """Return the values that were logged since the last call."""
        logged, self._run._logged = self._run._logged, {}
        return logged

    # ---- averaged weights -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor] | None:
        """Return a full state dict with the averaged weights in it, or None if no callback averages weights."""
        averages = self._averages()
        return {**self._run.model.state_dict(), **averages} if averages else None

    def _averages(self) -> dict[str, Tensor]:
        """Return the averaged weights by each name in the model's state dict; a tied weight has several names."""
        name = self._average
        if name is None:
            return {}
        with _user_code(f"callbacks.{name}.weights"):
            given = dict(self._members[name].weights())
        parameters = dict(self._run.model.named_parameters())
        if unknown := sorted(given.keys() - parameters.keys()):
            raise UserCodeError(f'callbacks.{name}.weights: the model has no parameter "{unknown[0]}".', "")
        by_parameter = {id(parameters[key]): value for key, value in given.items()}
        own = self._run.model.state_dict(keep_vars=True)
        return {key: by_parameter[id(value)] for key, value in own.items() if id(value) in by_parameter}

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Replace the trained weights of the model with the averaged weights inside the context."""
        chosen = self._averages()
        own = self._run.model.state_dict()
        trained = {name: own[name].clone() for name in chosen}
        _copy_all(chosen, own)
        try:
            yield
        finally:
            _copy_all(trained, own)

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {}
        for name, member in self._members.items():
            if hasattr(member, "state_dict"):
                with _user_code(f"callbacks.{name}.state_dict"):
                    state[name] = member.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of every callback. Callbacks without saved state, and unknown states, are skipped."""
        for name, member in self._members.items():
            if name in state and hasattr(member, "load_state_dict"):
                with _user_code(f"callbacks.{name}.load_state_dict"):
                    member.load_state_dict(state[name])


@torch.no_grad()
def _copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)


@contextmanager
def _user_code(where: str) -> Iterator[None]:
    """Raise an exception of the user's code inside as a UserCodeError that names `where`."""
    try:
        yield
    except LaunchError:
        raise
    except Exception as error:
        raise UserCodeError(f"{where}: {type(error).__name__}: {error}", traceback_of_user(error)) from error


def build_callbacks(job: Job) -> dict[str, Any]:
    """Build the callbacks of the configuration, by name.

    Raises:
        ConfigError, TrustError: the class of a section does not exist, or does not accept an argument; or two
            callbacks average the weights.
        UserCodeError: a constructor raised an exception.
    """
    members = {}
    for name, section in job.callbacks.items():
        if section is None:  # removed from an overlay, by callbacks.NAME=null
            continue
        where = f"callbacks.{name}"
        targets.check_signature(section, "callback", job.trust, at=where)
        with _user_code(where):
            members[name] = construct(section, "callback", job.trust, at=where)
    averages = [name for name, member in members.items() if hasattr(member, "weights")]
    if len(averages) > 1:
        raise ConfigError(f"callbacks: {' and '.join(averages)} both average the weights. Remove one of them.")
    if averages and kind_of(job.strategy, job.trust).diverges:
        raise ConfigError(
            f"callbacks.{averages[0]} averages the weights, which strategy={job.strategy.name} does not support: each "
            "worker has different weights, and their average over the workers is evaluated already. Remove the "
            "callback "
            f"(~callbacks.{averages[0]}), or use strategy={DEFAULT}.",
            key=f"callbacks.{averages[0]}",
        )
    return members


def check_callbacks(job: Job, tags: list[str] | None) -> None:
    """Check the callbacks at the start: as `build_callbacks`, and that early stopping monitors an existing tag.

    Args:
        tags: the tags of the job, or None if they are not all known.
    """
    for name, member in build_callbacks(job).items():
        if tags is not None and isinstance(member, EarlyStopping) and member.monitor not in tags:
            raise ConfigError(
                f"callbacks.{name}.monitor={member.monitor} is not a tag of this job. Available tags: "
                f"{', '.join(tags)}."
                f"{did_you_mean(str(member.monitor), tags)}",
                key=f"callbacks.{name}.monitor",
            )


# ---- built in -------------------------------------------------------------------------------------------------------


class Ema:
    """Keeps an exponential moving average of the weights, which is evaluated instead of the trained weights.

    Source: Polyak and Juditsky 1992. After step n, average = d * average + (1 - d) * weight, where d is the smaller of
    `decay` and (1 + n) / (10 + n), so that the random initial weights lose their influence early (as in TensorFlow's
    ExponentialMovingAverage). Parameters are averaged in float32 or wider; buffers are not averaged. All ranks compute
    the same averages.

    Args:
        decay: in [0, 1); the average covers about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                f"callbacks.ema.decay={decay} must be at least 0 and less than 1, such as 0.999.",
                key="callbacks.ema.decay",
            )
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
    """Copy a full tensor into a tensor that may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # imports SymPy, which takes half a second

    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


class EarlyStopping:
    """Ends a run when its evaluations no longer improve. The reason in result.json is `early_stopping`.

    Args:
        patience: number of consecutive evaluations without improvement after which the run ends.
        min_delta: minimum change of the value that counts as an improvement, at least 0.
        monitor: the monitored tag; default: `checkpoint.monitor`.
        mode: `min` or `max`; default: `checkpoint.mode`.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, monitor: str | None = "val/loss", mode: str = "min"
    ) -> None:
        if patience < 1 or not 0 <= min_delta < math.inf or mode not in ("min", "max"):
            raise ConfigError(
                f"callbacks.early_stopping: patience={patience}, min_delta={min_delta}, mode={mode}. patience must be "
                "at "
                "least 1, min_delta at least 0, and mode min or max.",
                key="callbacks.early_stopping",
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
