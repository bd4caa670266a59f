"""Tests the model's steps with batches of several sizes, to find results that depend on the batch size.

A metric may be valid for one batch size only: for a batch of two samples, a list of two numbers is read as a pair (sum,
count). A loss over the whole batch (contrastive, in-batch negatives) depends on how a batch is split. A layer may
reject a batch of one sample. A collective in the model needs the same number of samples on every worker.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launcher.config import Job
from launcher.engine.data import Loader
from launcher.engine.datasets import Data
from launcher.engine.fetch import Fetch
from launcher.engine.metrics import ContractError, Sums, as_pair
from launcher.engine.preserve import preserve_model
from launcher.engine.randomness import preserve_random_states
from launcher.engine.shares import Shares
from launcher.engine.trial_world import Call, TrialWorld
from launcher.errors import ConfigError
from launcher.formatting import count

Pair = tuple[Tensor, Any]  # (sum, count)
Answer = Mapping[str, Pair]
_TOLERANCE = 1e-3  # relative; float32 sums in another order differ by 1e-6


class BatchReader:
    """Reads batches of the first samples of a data set like the training loop.

    Attributes:
        drew: whether collating a batch used random numbers, which then differ between batches.
    """

    def __init__(self, job: Job, data: Data, dataset: Any, name: str, convert: Callable[[Any], Any]) -> None:
        self.drew = False
        collate = None if data.collate is None else self._watched(data.collate)
        augment = data.augment if dataset is data.train else None
        fetch = Fetch(dataset, collate, job.trainer.seed, augment and self._watched(augment), name)
        self._loader = Loader(fetch, torch.device("cpu"), 0, convert)
        self._gather = getattr(dataset, "__getitems__", None)
        self.samples = len(dataset)

    def __call__(self, start: int, stop: int) -> Any:
        return next(self._loader.once(0, torch.arange(start, min(stop, self.samples)), start))

    def check_gather(self) -> None:
        """Check whether the data set's `__getitems__` draws random numbers, unless it accepts the samples' seeds."""
        if self._gather is not None and "seeds" not in signature(self._gather).parameters:
            with preserve_random_states():
                self._watched(self._gather)(list(range(min(2, self.samples))))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            before = _random_states()
            answer = function(*arguments, **named)
            self.drew = self.drew or _random_states() != before
            return answer

        return watched


class Trials:
    """Calls one of the model's steps with batches of several sizes, from the first samples of a data set.

    Args:
        name: name of the step, for messages.
        model: the model, whose state is preserved. Its dropout layers are disabled when results are compared.
        call: the step, a function batch -> result.
        read: returns the batch of the samples [start, stop).
        shares: the batches of the run.
        world: records the collectives of the model.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        call: Callable[[Any], Mapping[str, Any]],
        read: BatchReader,
        shares: list[Shares],
        world: TrialWorld,
    ) -> None:
        self._name, self._model, self._call, self._read = name, model, call, read
        self._samples, self._shares, self._world = read.samples, shares, world
        self._sizes = {size for some in shares for worker in some.workers for size in worker}
        self._drew = False  # whether one of the compared passes used random numbers

    def run(self, first: Answer, calls: list[Call], remedy: str | None) -> list[str]:
        """Call the step with further batch sizes. Return notes, one line each.

        Args:
            first: the result for the first two samples.
            calls: the collectives of that pass.
            remedy: the remedy if the model rejects a batch of one sample that occurs in the run; None to skip this
                check.

        Raises:
            ContractError: a metric is invalid for another size, or its shape depends on the size.
            ConfigError: the model rejects the smallest share of the run, or does not support unequal shares.
        """
        silenced = _silenced(self._model)
        sums = Sums(torch.device("cpu"))
        sums.add(first)
        whole = rest = None
        for stop in range(3, min(4, self._samples) + 1):
            whole, larger = self._attempt(0, stop, silenced)
            if whole is None:
                continue
            sums.add(whole)
            if calls:
                self._check_collectives(calls, larger)
            rest, _ = self._attempt(2, stop, silenced)
            if rest is not None:
                break
        if self._samples == 2 and (one := self._attempt(0, 1, silenced)[0]) is not None:
            sums.add(one)
        if remedy is not None:
            self._check_smallest(remedy)
        if silenced and rest is not None:
            again, _ = self._attempt(0, 2, silenced)
            first = again or first
        self._read.check_gather()
        if whole is None or rest is None or self._drew or self._read.drew:
            return []
        return self._compared(whole, first, rest)

    def _attempt(
        self, start: int, stop: int, silenced: list[nn.Module], others: list[Call] | None = None
    ) -> tuple[Answer | None, list[Call]]:
        """Return the result, or None if the step fails for a size that the run does not have; and the collectives."""
        size = stop - start
        try:
            with _silent(silenced), self._world.a_pass(others or ()):
                return self._answer(start, stop), self._world.calls
        except Exception as error:
            # `_check_smallest` checks batches of one sample.
            if size > 1 and (size in self._sizes or isinstance(error, ContractError)):
                raise
            return None, self._world.calls

    def _answer(self, start: int, stop: int) -> Answer:
        batch = self._read(start, stop)
        with preserve_model(self._model):
            before = _random_states(self._model)
            answer = as_pairs(self._call(batch))
            self._drew = self._drew or _random_states(self._model) != before
        return answer

    def _compared(self, whole: Answer, first: Answer, rest: Answer) -> list[str]:
        """Return a note about metrics whose value for the whole batch differs from the sum over its two parts."""
        odd = [
            name for name in whole if name in first and name in rest and _differ(whole[name], first[name], rest[name])
        ]
        if not odd:
            return []
        quoted = ", ".join(f'"{name}"' for name in odd)
        return [
            f"{self._name}: {quoted} of a batch is not the sum over its samples. It depends on how the batch is split, "
            "so results depend on the number of workers and on trainer.microbatch_size. Keep both the same in runs "
            "that you compare (scaling.workers=1 without trainer.microbatch_size does not split global batches), "
            "or return one value per sample that does not depend on the other samples."
        ]

    def _check_smallest(self, remedy: str) -> None:
        """Raise ConfigError if the run has a share of one sample and the step rejects it."""
        alone = next((some for some in self._shares if any(1 in worker for worker in some.workers)), None)
        if alone is None:
            return
        try:
            with self._world.a_pass():
                self._answer(0, 1)
        except Exception as error:
            raise ConfigError(
                f"{alone.what[0].upper()}{alone.what[1:]} has {count(alone.size, 'sample')}, which the "
                f"{count(len(alone.workers), 'worker')} share as {alone.describe()}. {self._name} rejects a batch of "
                f"one sample: {str(error).strip().rstrip('.')}. {remedy}"
            ) from error

    # ---- collectives ------------------------------------------------------------------------------------------------

    def _check_collectives(self, calls: list[Call], larger: list[Call]) -> None:
        """Raise ConfigError if the model's collectives would not match on workers with unequal shares."""
        follows_size = [call.form for call in calls] != [call.form for call in larger]
        if follows_size and larger:
            # Simulate a worker with fewer samples than another: a model may pad to the largest share.
            _, calls = self._attempt(0, 2, [], larger)
            follows_size = [call.form for call in calls] != [call.form for call in larger]
        for shares in self._shares:
            if shares.are_equal or (shares.rounds_are_equal and not follows_size):
                continue
            raise ConfigError(
                f"{self._name} calls torch.distributed.{calls[0].name}, which needs equal shares on every worker. "
                f"{shares.what[0].upper()}{shares.what[1:]} has {count(shares.size, 'sample')}, which the "
                f"{count(len(shares.workers), 'worker')} share as {shares.describe()}. Make the number of samples and "
                "trainer.global_batch_size divisible by the number of workers, or pad to the largest share before the "
                "collective."
            )


def as_pairs(answer: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the (sum, count) of every metric. Raises ContractError for an invalid value."""
    pairs = {name: as_pair(name, value) for name, value in answer.items()}
    return {name: (total.detach(), count) for name, (total, count) in pairs.items()}


def _differ(whole: Pair, first: Pair, rest: Pair) -> bool:
    if not whole[0].shape == first[0].shape == rest[0].shape:
        return True
    total, of_parts = whole[0].double(), first[0].double() + rest[0].double()
    if not total.ndim:
        total, of_parts = total / float(whole[1]), of_parts / (float(first[1]) + float(rest[1]))
    if not (total.isfinite().all() and of_parts.isfinite().all()):
        return False  # also for a count of 0
    return bool(((total - of_parts).abs() > _TOLERANCE * total.abs().max() + 1e-6).any())


def _silenced(model: nn.Module) -> list[nn.Module]:
    """Return the layers in training mode that are random or depend on the batch by design; `caveats` reports them."""
    return [
        module
        for module in model.modules()
        if module.training
        and ("Dropout" in type(module).__name__ or "BatchNorm" in type(module).__name__ or _drops(module))
    ]


def _drops(module: nn.Module) -> bool:
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and bool(module.dropout)


@contextmanager
def _silent(modules: list[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def _random_states(model: nn.Module | None = None) -> tuple[Any, ...]:
    """Return the states of the global random generators, and of the model's own, for comparison."""
    own = [value for module in model.modules() for value in vars(module).values()] if model is not None else []
    generators = [value.get_state().numpy().tobytes() for value in own if isinstance(value, torch.Generator)]
    state = np.random.get_state(legacy=False)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(state), generators
