"""A sink is a destination for the numbers of a run, such as TensorBoard's file. Rank 0 alone has sinks.

A sink is one class in one file of this folder, which registers itself by name:

    @register("name")
    class Name(Sink): ...

Another package registers its own with an entry point of the group `launch.sinks`. A run uses the sinks that its
configuration turns on (`Sink.is_on`) and those that `logging.sinks` names.
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
    """Where a run is: optimizer steps done, epochs (with a fraction), samples of all workers, and the time of day."""

    step: int
    epoch: float
    samples: int
    time: float


@dataclass(frozen=True)
class SinkContext:
    """What a sink is opened with.

    Attributes:
        directory: the run on disk.
        resumed_at: the step that the run continues from; what was written for later steps is void. None for a new run.
        hyperparameters: the values to compare between runs, by key.
        drawing: the traced network and its arguments, see `drawing.traced_step`. Only for visual sinks of a new run.
    """

    directory: RunDirectory
    job: Job
    resumed_at: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    drawing: tuple[Any, Any] | None = None


class Sink(ABC):
    """Takes the numbers of a run. It is built and opened once, closed once, and called in the training process."""

    visual: ClassVar[bool] = False  # whether it shows figures, and the drawing of the network
    opens_late: ClassVar[bool] = False  # whether it is opened after the first step, since opening takes long

    @classmethod
    def is_on(cls, job: Job) -> bool:
        """Return whether the configuration turns the sink on without naming it in `logging.sinks`."""
        return False

    def open(self, context: SinkContext) -> None:  # noqa: B027 (most need nothing)
        """Begin to record, or continue the record of a resumed run."""

    @abstractmethod
    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        """Write the values of one step by tag, at most once a step."""

    def text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Write a text in Markdown."""

    def figures(self, values: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Show pictures, audio, text and figures by tag; see docs/extending.md for their forms.

        Raises:
            ValueError: a value has none of these forms.
        """

    def close(self, ended_well: bool) -> None:  # noqa: B027
        """End the record. ended_well: False where the run failed."""


_SINKS: Registry[type[Sink]] = Registry("launcher.engine.sinks", "launch.sinks", "logging.sinks")
register = _SINKS.register


def chosen_sinks(job: Job) -> list[type[Sink]]:
    """Return the sinks of a job.

    Raises:
        ConfigError: `logging.sinks` names one that does not exist or cannot be imported.
        TrustError: it names one of a package that `trust` does not name.
    """
    named = [_SINKS.get(name, job.trust) for name in job.logging.sinks]
    return list(dict.fromkeys([*(kind for kind in _SINKS.all().values() if kind.is_on(job)), *named]))
