"""The start check: a small batch of each data set goes through the network before any worker is started.

Errors that can be found this way (wrong data, a model that breaks its contract, a monitor that does not exist) are
reported before a run directory exists.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.config import Job
from launcher.engine.build import build_data, build_model, converter
from launcher.engine.datasets import Data
from launcher.engine.evaluation import summarize, validation_answer
from launcher.engine.failures import is_foreign
from launcher.engine.metrics import Sums, check_answer, check_names
from launcher.engine.preserve import evaluation_mode, preserve_model
from launcher.engine.runtime import Runtime
from launcher.engine.saved_tensors import SavedTensorBytes
from launcher.engine.shares import training_shares, validation_shares
from launcher.engine.strategies.strategy import loss_of
from launcher.engine.trial_world import TrialWorld
from launcher.engine.trials import BatchReader, Pair, Trials, as_pairs
from launcher.engine.weights import check_weights, on_this_machine
from launcher.errors import ConfigError, RequestError, UserCodeError, did_you_mean

SAMPLES = 2  # some layers refuse a batch of one
_TRIED = 64  # samples of other data than those of the run: labels that it does not know may come late


class StartCheck:
    """Tries a model with small batches of its data.

    Args:
        model: the network on the CPU; it is left as it was.
        workers: of the run.

    Attributes:
        kept: what autograd keeps of the two samples that `train` puts through the network.
        tags: of the run.
        notes: what the user has to know, one line each.
    """

    def __init__(self, job: Job, model: nn.Module, data: Data, workers: int) -> None:
        _check_signatures(model)
        self._job, self._model, self._data, self._workers = job, model, data, workers
        self._world = TrialWorld(workers)
        self.saved = SavedTensorBytes(model)
        self.tags: list[str] = []
        self.notes: list[str] = ignored_methods(model)

    def train(self) -> None:
        """Put two samples through `training_step`.

        Raises:
            ContractError: it does not return what it must.
            ConfigError: it raised a ValueError that says why the data does not fit.
        """
        read = self._reader(self._data.train, "train")
        batch = read(0, SAMPLES)
        with self._world.installed(), preserve_model(self._model):
            with self._world.a_pass(), self.saved.recording():
                answer = self._training_step(batch)
            loss_of(answer)
            self._first = as_pairs(answer)
        self._calls = self._world.calls
        self._read = read
        self.tags += [f"train/{name}" for name in sorted(answer)]

    def _training_step(self, batch: Any) -> dict[str, Any]:
        answer = check_answer(call_user_step(self._model.training_step, batch))
        check_names(answer, "training_step")
        return answer

    def load(self, weights: str) -> None:
        """Compare names and shapes of the weights that the run begins with; after `train`, which makes lazy layers.

        Raises:
            CheckpointError: they cannot be read, or do not fit the model.
        """
        from launcher.engine.checkpoint import load_weights  # when it is needed: see `checkpoint.saver`

        path = on_this_machine(weights)
        assert path is not None
        there = load_weights(path, shapes_only=True)
        check_weights(self._model, there, weights, self._job.checkpoint.load_strict)

    def try_sizes(self) -> None:
        """Put batches of other sizes through `training_step`; after `train`.

        Raises:
            ContractError: it returns something else for another size.
            ConfigError: it does not take a share that a worker gets.
        """
        shares = training_shares(self._job, self._data, self._workers)
        remedy = None if self._job.trainer.sync_batchnorm else self._remedy()
        trials = Trials("training_step", self._model, self._training_step, self._read, shares, self._world)
        with self._world.installed():
            self.notes += trials.run(self._first, self._calls, remedy)

    def evaluate(self) -> None:
        """Put small batches of the validation sets through `validation_step`.

        Raises:
            ContractError, ConfigError: as `train` and `try_sizes` do.
        """
        name = "validation_step" if hasattr(self._model, "validation_step") else "training_step (in evaluation)"

        def call(batch: Any) -> dict[str, Any]:
            answer = validation_answer(self._model, batch)
            check_names(answer, "validation_step")
            return answer

        shares = validation_shares(self._job, self._data, self._workers)
        with evaluation_mode(self._model), torch.no_grad(), self._world.installed():
            for number, (prefix, dataset) in enumerate(self._data.val.items()):
                read = self._reader(dataset, f"val/{prefix}".rstrip("/"))
                batch = read(0, SAMPLES)
                with preserve_model(self._model), self._world.a_pass():
                    first = as_pairs(call_user_step(call, batch))
                    found = self._metrics(first)
                self.tags += [f"val/{prefix}/{metric}" if prefix else f"val/{metric}" for metric in found]
                if number == 0:
                    trials = Trials(name, self._model, call, read, shares, self._world)
                    remedy = "The model must take a batch of any size in evaluation."
                    notes = trials.run(first, self._world.calls, remedy)
                    self.notes += notes if hasattr(self._model, "validation_step") else []

    def _metrics(self, answer: Mapping[str, Pair]) -> list[str]:
        """Return the names of the scalars of an answer, and of what `summarize` makes of it."""
        sums = Sums(torch.device("cpu"))
        sums.add(answer)
        totals = sums.reduce(Runtime.single("cpu"))
        scalars = [metric for metric, (total, _) in totals.items() if total.ndim == 0]
        made = summarize(self._model, totals)
        check_names(made, "summarize")
        return [*scalars, *made]

    def _reader(self, dataset: Any, name: str) -> BatchReader:
        return BatchReader(self._job, self._data, dataset, name, converter(self._model))

    def _remedy(self) -> str:
        """Return what to do about a share of one sample."""
        asked = self._job.trainer.global_batch_size
        for size in sorted(range(2, 2 * asked), key=lambda size: abs(size - asked)):
            trainer = replace(self._job.trainer, global_batch_size=size)
            shares = training_shares(replace(self._job, trainer=trainer), self._data, self._workers)
            if all(some.smallest > 1 for some in shares):
                return f"Choose another batch size, such as trainer.global_batch_size={size}, or fewer workers."
        return "Choose a larger trainer.global_batch_size, or fewer workers."


# Methods of other trainers that are not called, and what does their work here.
_ELSEWHERE = {
    "the sections `optimizer` and `scheduler`": ("configure_optimizers", "lr_scheduler_step", "optimizer_step"),
    "`trainer.clip_norm`": ("configure_gradient_clipping", "clip_gradients"),
    "`summarize(totals)`": (
        "validation_epoch_end",
        "on_validation_epoch_end",
        "test_epoch_end",
        "on_test_epoch_end",
        "validation_step_end",
    ),
    "`validation_step`": ("test_step",),
    "the section `data`": (
        "train_dataloader",
        "val_dataloader",
        "test_dataloader",
        "prepare_data",
        "transfer_batch_to_device",
        "on_before_batch_transfer",
        "on_after_batch_transfer",
    ),
    "the methods of a callback (`on_start`, `on_step`, `on_evaluate`, `on_log`, `on_end`)": (
        "on_fit_start",
        "on_fit_end",
        "on_train_start",
        "on_train_end",
        "training_epoch_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_before_optimizer_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_save_checkpoint",
        "on_load_checkpoint",
    ),
}


def ignored_methods(model: nn.Module) -> list[str]:
    """Return one line that names the model's methods of other trainers, and what stands in their place; or none."""
    own = {
        name
        for kind in type(model).__mro__
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "lightning", "pytorch_lightning")
        for name, value in vars(kind).items()
        if callable(value)
    }
    found = [
        f"{', '.join(present)} (use {instead})"
        for instead, names in _ELSEWHERE.items()
        if (present := [name for name in names if name in own])
    ]
    return [f"{type(model).__name__} has methods that launch never calls: {'; '.join(found)}."] if found else []


def _check_signatures(model: nn.Module) -> None:
    """Raise ConfigError where a step needs more than a batch, such as the `batch_idx` of other trainers."""
    for name in ("training_step", "validation_step"):
        step = getattr(model, name, None)
        try:
            parameters = list(inspect.signature(step).parameters.values()) if step is not None else []
        except (TypeError, ValueError):
            continue
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [one.name for one in parameters[1:] if one.kind in plain and one.default is one.empty]
        if needed:
            raise ConfigError(
                f"{type(model).__name__}.{name} needs {', '.join(needed)} beside the batch, and launch calls "
                f"{name}(batch). Remove the parameter, or give it a default."
            )


def check_monitor(job: Job, tags: list[str], data: Data) -> None:
    monitor = job.checkpoint.monitor
    if monitor is None or monitor in tags or (not data.val and monitor == "val/loss"):
        return
    raise ConfigError(
        f"checkpoint.monitor={monitor} is no tag of this job; there are {', '.join(tags)}.{did_you_mean(monitor, tags)}"
    )


def call_user_step(step: Any, *arguments: Any) -> Any:
    """Call `step`. A ValueError that the model raises itself, in a `raise` of its own, says why data does not fit it.

    Raises:
        ConfigError: with those words, and not as a bug with its traceback.
    """
    try:
        return step(*arguments)
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if is_foreign(last.filename) or not (last.line or "").startswith("raise "):
            raise
        raise ConfigError(str(error)) from error


def check_fit(job: Job, name: str) -> None:
    """Raise ConfigError where the network of the run `name` does not take a small batch of each of the job's sets."""
    data = build_data(job)
    model = build_model(without_sync_batchnorm(job), Runtime.single("cpu")).eval()
    for dataset in (*data.val.values(), *data.test.values()):
        try:
            with torch.no_grad():
                validation_answer(model, BatchReader(job, data, dataset, "", converter(model))(0, _TRIED))
        except RequestError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: " if not isinstance(error, (ValueError, UserCodeError)) else ""
            raise ConfigError(
                f'The network of the run "{name}" does not fit data._target_={job.data["_target_"]}: {what}{error} '
                "Choose data of the same kind as those that it was trained on."
            ) from error


def without_sync_batchnorm(job: Job) -> Job:
    """Return the job without what needs GPUs: the start check runs on the CPU."""
    return replace(job, trainer=replace(job.trainer, sync_batchnorm=False))
