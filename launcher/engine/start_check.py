"""The start check: passes a small batch of each data set through the network before any worker is started.

It reports errors (wrong data, a model that violates its contract, a monitored tag that does not exist) before a run
directory exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.config import Job
from launcher.engine import checkpoint
from launcher.engine.build import build_data, build_model, converter
from launcher.engine.datasets import Data
from launcher.engine.evaluation import ROWS, summarize, takes_rows, validation_answer
from launcher.engine.failures import is_raised_by_user
from launcher.engine.metrics import ContractError, Sums, check_answer, check_names
from launcher.engine.preserve import evaluation_mode, preserve_model
from launcher.engine.rows import Column, check_packable, check_same_kinds, columns_of, kinds_of, whole_of
from launcher.engine.runtime import Runtime
from launcher.engine.saved_tensors import SavedTensorBytes
from launcher.engine.shares import training_shares, validation_shares
from launcher.engine.steps import StepInfo, call_training_step, takes_step
from launcher.engine.strategies.strategy import loss_of
from launcher.engine.trial_world import TrialWorld
from launcher.engine.trials import BatchReader, Pair, Trials, as_pairs
from launcher.engine.weights import check_weights, on_this_machine
from launcher.errors import ConfigError, RequestError, UserCodeError, did_you_mean

SAMPLES = 2  # some layers reject a batch of one sample
_FIT_SAMPLES = 64  # of other data than the run's: unknown labels may be rare


class StartCheck:
    """Tests a model with small batches of its data.

    Args:
        model: the network on the CPU; its state is preserved.
        workers: number of workers of the run.
        total_steps: number of optimizer steps of the run.

    Attributes:
        saved: the tensors that autograd saves for the two samples of `train`.
        tags: the tags of the run.
        knows_all_tags: whether `tags` has the metrics of `summarize`.
        notes: notes for the user, one line each.
    """

    def __init__(self, job: Job, model: nn.Module, data: Data, workers: int, total_steps: int) -> None:
        _check_signatures(model)
        _check_compile(model, job)
        self._info = StepInfo(total_steps=total_steps, world_size=workers)
        self._job, self._model, self._data, self._workers = job, model, data, workers
        self._world = TrialWorld(workers)
        self.saved = SavedTensorBytes(model)
        self.tags: list[str] = []
        self.knows_all_tags = True
        self._rows: dict[str, Column] | None = None  # of the first batch of a set
        self.notes: list[str] = ignored_methods(model)

    def train(self) -> None:
        """Pass two samples through `training_step`.

        Raises:
            ContractError: the result is invalid.
            ConfigError: `training_step` raised a ValueError about the data.
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
        answer = check_answer(call_user_step(call_training_step, self._model, batch, self._info))
        check_names(answer, "training_step")
        return answer

    def load(self, weights: str) -> None:
        """Compare names and shapes of the weights that the run starts from. Call it after `train` (lazy layers).

        Raises:
            CheckpointError: the weights cannot be read, or do not fit the model.
        """
        path = on_this_machine(weights)
        assert path is not None
        stored = checkpoint.load_weights(path, shapes_only=True)
        check_weights(self._model, stored, weights, self._job.checkpoint.load_strict)

    def try_sizes(self) -> None:
        """Pass batches of other sizes through `training_step`. Call it after `train`.

        Raises:
            ContractError: the form of the result depends on the batch size.
            ConfigError: `training_step` rejects a batch size that occurs in the run.
        """
        shares = training_shares(self._job, self._data, self._workers)
        remedy = None if self._job.trainer.sync_batchnorm else self._remedy()
        trials = Trials("training_step", self._model, self._training_step, self._read, shares, self._world)
        with self._world.installed():
            self.notes += trials.run(self._first, self._calls, remedy)

    def evaluate(self) -> None:
        """Pass small batches of the validation sets through `validation_step`.

        Raises:
            ContractError, ConfigError: as in `train` and `try_sizes`.
        """
        name = "validation_step" if hasattr(self._model, "validation_step") else "training_step (in evaluation)"

        def call(batch: Any) -> dict[str, Any]:
            answer = validation_answer(self._model, batch, self._info)
            rows = answer.pop(ROWS, None)
            if rows is not None:
                self._check_rows(rows)
            check_names(answer, "validation_step")
            return answer

        shares = validation_shares(self._job, self._data, self._workers)
        with evaluation_mode(self._model), torch.no_grad(), self._world.installed():
            for number, (prefix, dataset) in enumerate(self._data.val.items()):
                read = self._reader(dataset, f"val/{prefix}".rstrip("/"))
                batch = read(0, SAMPLES)
                self._rows = None
                with preserve_model(self._model), self._world.a_pass():
                    first = as_pairs(call_user_step(call, batch))
                    found = self._metrics(first)
                self.tags += [f"val/{prefix}/{metric}" if prefix else f"val/{metric}" for metric in found]
                if number == 0:
                    trials = Trials(name, self._model, call, read, shares, self._world)
                    remedy = "The model must support batches of any size in evaluation."
                    notes = trials.run(first, self._world.calls, remedy)
                    self.notes += notes if hasattr(self._model, "validation_step") else []

    def _metrics(self, answer: Mapping[str, Pair]) -> list[str]:
        """Return the names of the scalar metrics of a result, including those of `summarize`."""
        sums = Sums(torch.device("cpu"))
        sums.add(answer)
        totals = sums.reduce(Runtime.single("cpu"))
        scalars = [metric for metric, (total, _) in totals.items() if total.ndim == 0]
        if takes_rows(self._model):
            return [*scalars, *self._summary_of_rows(totals)]
        summary = summarize(self._model, totals)
        check_names(summary, "summarize")
        return [*scalars, *summary]

    def _check_rows(self, rows: Any) -> None:
        columns = columns_of(rows, SAMPLES if self._rows is None else None)
        check_packable(columns)
        if self._rows is None:
            self._rows = columns
        check_same_kinds(kinds_of(self._rows), kinds_of(columns))

    def _summary_of_rows(self, totals: Mapping[str, tuple[torch.Tensor, float]]) -> list[str]:
        """Return the names that `summarize` returns for the rows of two samples.

        Many metrics of predictions are not defined for so few samples: if it raises, the names remain unknown.
        """
        if self._rows is None:
            raise ContractError(
                f"{type(self._model).__name__}.summarize has a second parameter for the rows of all samples, but "
                'validation_step returns no "rows". Return them, or remove the parameter.'
            )
        try:
            summary = summarize(self._model, totals, whole_of(self._rows))
        except Exception as error:
            self.knows_all_tags = False
            self.notes.append(
                f"summarize cannot be tried on two samples ({type(error).__name__}: {error}), so its metrics are not "
                "checked before the run."
            )
            return []
        check_names(summary, "summarize")
        return list(summary)

    def _reader(self, dataset: Any, name: str) -> BatchReader:
        return BatchReader(self._job, self._data, dataset, name, converter(self._model))

    def _remedy(self) -> str:
        """Return the remedy for a share of one sample."""
        configured = self._job.trainer.global_batch_size
        for size in sorted(range(2, 2 * configured), key=lambda size: abs(size - configured)):
            trainer = replace(self._job.trainer, global_batch_size=size)
            shares = training_shares(replace(self._job, trainer=trainer), self._data, self._workers)
            if all(some.smallest > 1 for some in shares):
                return f"Choose another batch size, such as trainer.global_batch_size={size}, or fewer workers."
        return "Choose a larger trainer.global_batch_size, or fewer workers."


# Equivalent in launch -> methods of other trainers that launch does not call.
_METHODS_OF_OTHERS = {
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
    """Return a note about the model's methods for other trainers and their equivalents, or no note."""
    own = {
        name
        for kind in type(model).__mro__
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "lightning", "pytorch_lightning")
        for name, value in vars(kind).items()
        if callable(value)
    }
    found = [
        f"{', '.join(present)} (use {instead})"
        for instead, names in _METHODS_OF_OTHERS.items()
        if (present := [name for name in names if name in own])
    ]
    return [f"{type(model).__name__} has methods that launch never calls: {'; '.join(found)}."] if found else []


def _check_signatures(model: nn.Module) -> None:
    """Raise ConfigError if a step has further required parameters, such as the `batch_idx` of other trainers."""
    for name in ("training_step", "validation_step"):
        step = getattr(model, name, None)
        try:
            parameters = list(inspect.signature(step).parameters.values()) if step is not None else []
        except (TypeError, ValueError):
            continue
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = 2 if name == "training_step" else 1
        needed = [one.name for one in parameters[given:] if one.kind in plain and one.default is one.empty]
        if needed:
            call = "training_step(batch, step)" if given == 2 else f"{name}(batch)"
            raise ConfigError(
                f"{type(model).__name__}.{name} also requires {', '.join(needed)}, but launch calls {call}. Remove the "
                "parameter, or give it a default value."
            )


def _check_compile(model: nn.Module, job: Job) -> None:
    """Raise ConfigError if the whole training step would be compiled again for the numbers of every step."""
    if job.trainer.compile and not job.trainer.compile_blocks and takes_step(model):
        raise ConfigError(
            f"trainer.compile=true compiles {type(model).__name__}.training_step, whose second parameter has other "
            "numbers in every step, so it would be compiled again in each. Add trainer.compile_blocks=true, which "
            "compiles the layers only, or remove the parameter.",
            key="trainer.compile",
        )


def check_monitor(job: Job, tags: list[str], data: Data) -> None:
    """Raise ConfigError if the job does not log the tag `checkpoint.monitor`."""
    monitor = job.checkpoint.monitor
    if monitor is None or monitor in tags or (not data.val and monitor == "val/loss"):
        return
    raise ConfigError(
        f"checkpoint.monitor={monitor} is not a tag of this job. Available tags: {', '.join(tags)}."
        f"{did_you_mean(monitor, tags)}",
        key="checkpoint.monitor",
    )


def call_user_step(step: Any, *arguments: Any) -> Any:
    """Call a step of the model.

    Raises:
        ConfigError: a `raise` statement of the model raised a ValueError; has its message, without a traceback.
    """
    try:
        return step(*arguments)
    except ValueError as error:
        if not is_raised_by_user(error):
            raise
        raise ConfigError(str(error)) from error


def check_fit(job: Job, name: str) -> None:
    """Raise ConfigError if the network of the run `name` rejects a small batch of one of the job's data sets."""
    data = build_data(job)
    model = build_model(without_sync_batchnorm(job), Runtime.single("cpu")).eval()
    for dataset in (*data.val.values(), *data.test.values()):
        try:
            with torch.no_grad():
                batch = BatchReader(job, data, dataset, "", converter(model))(0, _FIT_SAMPLES)
                validation_answer(model, batch, StepInfo())
        except RequestError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: " if not isinstance(error, (ValueError, UserCodeError)) else ""
            raise ConfigError(
                f'The network of the run "{name}" does not fit data._target_={job.data["_target_"]}: {what}{error} '
                "Choose data of the same kind as the training data."
            ) from error


def without_sync_batchnorm(job: Job) -> Job:
    """Return the job without SyncBatchNorm, which needs GPUs: the start check runs on the CPU."""
    return replace(job, trainer=replace(job.trainer, sync_batchnorm=False))
