"""The start check: a small batch of each data set goes through the network before any worker is started.

Errors that can be found this way (wrong data, a model that breaks its contract, a monitor that does not exist) are
reported before a run directory exists.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.config import Job
from launcher.engine.build import build_data, build_model, converter
from launcher.engine.data import Fetch, Loader
from launcher.engine.datasets import Data
from launcher.engine.evaluation import summarize, validation_answer
from launcher.engine.failures import is_foreign
from launcher.engine.kept import KeptBytes
from launcher.engine.metrics import Sums, check_answer
from launcher.engine.runtime import Runtime
from launcher.engine.untouched import evaluating, untouched
from launcher.errors import ConfigError, RequestError, UserCodeError, did_you_mean

SAMPLES = 2  # some layers refuse a batch of one
_TRIED = 64  # samples of other data than those of the run: labels that it does not know may come late


def try_training(job: Job, model: nn.Module, data: Data, runtime: Runtime) -> tuple[KeptBytes, list[str]]:
    """Return what autograd keeps for the small batch, and the names that `training_step` returns."""
    kept = KeptBytes(model)
    batch = small_batch(job, data, data.train, model, runtime)
    with untouched(model), kept.counted():
        answer = check_answer(said_in_words(model.training_step, batch))
    sums = Sums(runtime.device)
    sums.add(answer)
    return kept, sums.names


def try_validation(job: Job, model: nn.Module, data: Data, runtime: Runtime) -> list[str]:
    """Return the tags of the validation sets: the names that `validation_step` and `summarize` return."""
    return [
        f"val/{name}/{metric}" if name else f"val/{metric}"
        for name in data.val
        for metric in _val_names(job, model, data, name, runtime)
    ]


def _val_names(job: Job, model: nn.Module, data: Data, name: str, runtime: Runtime) -> list[str]:
    batch = small_batch(job, data, data.val[name], model, runtime)
    with untouched(model), evaluating(model), torch.no_grad():
        sums = Sums(runtime.device)
        sums.add(said_in_words(validation_answer, model, batch))
    totals = sums.reduce(runtime)
    scalars = [metric for metric, (total, _) in totals.items() if total.ndim == 0]
    return [*scalars, *summarize(model, totals)]


def check_monitor(job: Job, tags: list[str], data: Data) -> None:
    monitor = job.checkpoint.monitor
    if monitor is None or monitor in tags or (not data.val and monitor == "val/loss"):
        return
    raise ConfigError(
        f"checkpoint.monitor={monitor} is no tag of this job; there are {', '.join(tags)}.{did_you_mean(monitor, tags)}"
    )


def small_batch(job: Job, data: Data, dataset: Any, model: nn.Module, runtime: Runtime, samples: int = SAMPLES) -> Any:
    """Return a batch of the first `samples` samples of `dataset`, as the training loop would read it."""
    augment = data.augment if dataset is data.train else None
    fetch = Fetch(dataset, data.collate, job.trainer.seed, augment)
    loader = Loader(fetch, runtime.device, 0, converter(model))
    return next(loader.once(0, torch.arange(min(samples, len(dataset)))))


def said_in_words(step: Any, *arguments: Any) -> Any:
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
    runtime = Runtime.single("cpu")
    model = build_model(without_sync_batchnorm(job), runtime).eval()
    for dataset in (*data.val.values(), *data.test.values()):
        try:
            with torch.no_grad():
                batch = small_batch(job, data, dataset, model, runtime, _TRIED)
                validation_answer(model, batch)
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
