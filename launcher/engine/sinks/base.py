"""The base class of sinks, which write the metrics of a run, for example to TensorBoard's file. Only rank 0 has sinks.

A sink is a class in its own file of this folder, which registers itself by name:

    @register("name")
    class Name(Sink): ...

Another package registers its sinks with an entry point of the group `launch.sinks`. A run uses the sinks that its
configuration enables (`Sink.is_on`) and those that `logging.sinks` names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from launcher.config import Job
from launcher.engine.registry import Registry
from launcher.runs import RunDirectory


@dataclass(frozen=True)
class Position:
    """The progress of a run: optimizer steps, epochs (fractional), samples of all workers, and seconds since 1970."""

    step: int
    epoch: float
    samples: int
    time: float


@dataclass(frozen=True)
class SinkContext:
    """The arguments of `Sink.open`.

    Attributes:
        directory: the run's directory.
        resumed_at: the step from which the run resumes; values of later steps are invalid. None for a new run.
        hyperparameters: the values to compare between runs, by key.
        drawing: the traced network and its arguments, see `drawing.traced_step`. Only for visual sinks of a new run.
    """

    directory: RunDirectory
    job: Job
    resumed_at: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    drawing: tuple[Any, Any] | None = None


class Sink(ABC):
    """Receives the metrics of a run, in the training process. It is constructed, opened and closed once.

    Attributes:
        visual: whether it shows figures and the graph of the network.
        opens_late: whether it is opened after the first step, because opening is slow.
    """

    visual: ClassVar[bool] = False
    opens_late: ClassVar[bool] = False

    @classmethod
    def is_on(cls, job: Job) -> bool:
        """Return whether the configuration enables the sink without naming it in `logging.sinks`."""
        return False

    def open(self, context: SinkContext) -> None:  # noqa: B027 (optional)
        """Start the record of a new run, or continue that of a resumed run."""

    @abstractmethod
    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        """Write the values of one step by tag. Called at most once per step."""

    def text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Write a text in Markdown."""

    def figures(self, values: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Show pictures, audio, text and figures by tag; see docs/extending.md for their forms.

        Raises:
            ValueError: a value has none of these forms.
        """

    def close(self, ended_well: bool) -> None:  # noqa: B027
        """Close the record. ended_well: False if the run failed."""


_SINKS: Registry[type[Sink]] = Registry("launcher.engine.sinks", "launch.sinks", "logging.sinks")
register = _SINKS.register


def chosen_sinks(job: Job) -> list[type[Sink]]:
    """Return the sinks of a job.

    Raises:
        ConfigError: `logging.sinks` names a sink that does not exist or cannot be imported.
        TrustError: `logging.sinks` names a sink of a package that `trust` does not name.
    """
    named = [_SINKS.get(name, job.trust) for name in job.logging.sinks]
    return list(dict.fromkeys([*(kind for kind in _SINKS.all().values() if kind.is_on(job)), *named]))
