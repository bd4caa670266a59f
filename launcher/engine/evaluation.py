"""Evaluates the model on validation and test sets.

Every sample is used exactly once. The samples are divided among the workers without padding, and the sums are reduced
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.engine.data import Loader
from launcher.engine.examples import Examples
from launcher.engine.metrics import Sums, check_answer, means
from launcher.engine.order import Split, keys_of_evaluation
from launcher.engine.preserve import evaluation_mode
from launcher.engine.rows import Rows
from launcher.engine.runtime import Runtime
from launcher.engine.steps import StepInfo, call_training_step
from launcher.engine.strategies.strategy import Strategy
from launcher.errors import TrainingError, UserCodeError

ROWS = "rows"  # the entry of the result of `validation_step` that is not a metric


@dataclass(frozen=True)
class Evaluated:
    """A data set to evaluate on: its loader, the order of its samples (N,), and its division among workers."""

    loader: Loader
    order: torch.Tensor
    split: Split


class Evaluator:
    """Evaluates the model on one or several data sets.

    Args:
        sets: the data sets by name; the name of a single set is "".
        exact: sum in fixed point (deterministic mode).
        folder: the run's directory, for rows that are too large for the memory.
        tag: `val` or `test`. Results are `<tag>/<metric>`, or `<tag>/<name>/<metric>` with several sets.
        required: a tag of the results; another tag, such as `train/loss`, is ignored.

    Raises:
        TrainingError: `run` did not find the required tag.

    Attributes:
        examples: receives this rank's first microbatch of every set, unless it is None.
        take_rows: receives (prefix of the tags, rows) of each set on rank 0, unless it is None.
    """

    def __init__(
        self,
        strategy: Strategy,
        runtime: Runtime,
        sets: Mapping[str, Evaluated],
        exact: bool,
        folder: Path,
        tag: str = "val",
        required: str | None = None,
    ) -> None:
        self._strategy = strategy
        self._runtime = runtime
        self._sets = sets
        self._exact = exact
        self._folder = folder
        self._tag = tag
        self._required = required if required is not None and required.startswith(f"{tag}/") else None
        self.examples: Examples | None = None
        self.take_rows: Callable[[str, Any], None] | None = None

    def run(self) -> dict[str, float]:
        """Return the global metrics by tag, on every rank. The mode of every module is restored."""
        results: dict[str, float] = {}
        model = self._strategy.model
        with evaluation_mode(model):
            for name, evaluated in self._sets.items():
                prefix = f"{self._tag}/{name}/" if name else f"{self._tag}/"
                found = self._one(evaluated, prefix)
                results.update({prefix + metric: value for metric, value in found.items()})
        # The start check knows all metrics but those of a `summarize` that needs many samples.
        if self._required is not None and self._required not in results and takes_rows(model):
            raise TrainingError(
                f"checkpoint.monitor={self._required} is not one of the results of the evaluation, which are "
                f"{', '.join(results)}. Name one of them, or return it from summarize."
            )
        return results

    def _one(self, evaluated: Evaluated, prefix: str) -> dict[str, float]:
        model, runtime = self._strategy.model, self._runtime
        sums = Sums(runtime.device, self._exact)
        order = evaluated.order
        spans = evaluated.split.share(len(order), runtime.rank, runtime.world_size)
        rows = Rows(sum(stop - start for start, stop in spans), self._folder) if self._collects_rows else None
        idle = [(0, 1)] * self._strategy.idle_rounds(evaluated.split, len(order))
        with torch.no_grad():
            for number, batch in enumerate(evaluated.loader.read(keys_of_evaluation(order, [*spans, *idle]))):
                with self._strategy.cast():
                    answer = self._strategy.call(partial(validation_answer, info=self._strategy.info), batch)
                    found = answer.pop(ROWS, None)
                    if number < len(spans):
                        sums.add(answer)
                        if rows is not None and found is not None:
                            rows.add(order[slice(*spans[number])], found)
                    if number == 0 and getattr(model, "examples", None) is not None:
                        with self._strategy.whole():
                            if self.examples is not None:
                                self.examples.show(prefix, batch, sums.names)
        self._agree(sums)
        totals = sums.reduce(runtime)
        collected = None if rows is None else rows.collect(runtime, len(order))
        if self.take_rows is not None and collected is not None:
            self.take_rows(prefix, collected)
        if getattr(model, "summarize", None) is None:
            return means(totals)
        # Computed on one rank: all ranks must agree on which checkpoint is the best one.
        return runtime.broadcast({**means(totals), **summarize(model, totals, collected)} if runtime.is_first else None)

    @property
    def _collects_rows(self) -> bool:
        return self.take_rows is not None or takes_rows(self._strategy.model)

    def _agree(self, sums: Sums) -> None:
        """Declare the names of the metrics on ranks with an empty share, which have no answer.

        Raises:
            TrainingError: on every rank, if names or shapes differ between ranks.
        """
        shapes = {name: tuple(value.shape) for name, value in sums.state_dict()["sums"].items()}
        everyone = [other for other in self._runtime.gather(shapes) if other]
        for other in everyone[1:]:
            odd = sorted({name for name, _ in other.items() ^ everyone[0].items()})
            if odd:
                raise TrainingError(
                    "validation_step must return the same names, with sums of the same shapes, for every batch; the "
                    f"workers differ in {', '.join(odd)}. Return a count of 0 for a metric that a batch does not "
                    "have: (0.0, 0)."
                )
        if everyone and not shapes:
            sums.declare_shapes(everyone[0])


def validation_answer(model: nn.Module, batch: Any, info: StepInfo) -> dict[str, Any]:
    """Return the answer of `validation_step` for a batch, or of `training_step` if the model has no other.

    Its entry `rows`, if there is one, is not a metric.
    """
    step = getattr(model, "validation_step", None)
    if step is not None:
        return check_answer(step(batch), "validation_step")
    return check_answer(call_training_step(model, batch, info))


def takes_rows(model: nn.Module) -> bool:
    """Whether the model's `summarize` has a second parameter, for the rows of all samples."""
    function = getattr(model, "summarize", None)
    if function is None:
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters) > 1


def summarize(model: nn.Module, totals: Mapping[str, tuple[torch.Tensor, float]], rows: Any = None) -> dict[str, float]:
    """Return the result of the model's `summarize` for the global totals {name: (sum, count)}; empty without it.

    Args:
        rows: the rows of all samples, for a `summarize` with a second parameter.

    Raises:
        UserCodeError: the result is not a mapping of names to numbers.
    """
    function = getattr(model, "summarize", None)
    if function is None:
        return {}
    answer = function(dict(totals), rows) if takes_rows(model) else function(dict(totals))
    if not isinstance(answer, Mapping):
        raise UserCodeError(
            f"summarize must return a mapping of names to numbers; found a {type(answer).__name__}.", ""
        )
    return {str(name): float(value) for name, value in answer.items()}
