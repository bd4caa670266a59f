"""The sink that writes TensorBoard's event file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.config import Job
from launcher.engine.sinks.base import Position, Sink, SinkContext, register

if TYPE_CHECKING:
    from launcher.engine.event_file import EventFile


@register("tensorboard")
class TensorBoard(Sink):
    """Writes the run's scalars, its configuration, its graph and its hyperparameters into one event file."""

    visual = True
    opens_late = True
    _file: EventFile

    @classmethod
    def is_on(cls, job: Job) -> bool:
        return job.logging.tensorboard

    def open(self, context: SinkContext) -> None:
        from launcher.engine.event_file import EventFile  # imports TensorBoard, which would delay the first step

        purge_step = None if context.resumed_at is None else context.resumed_at + 1  # later values are dropped
        self._file = EventFile(context.directory.path, purge_step)
        if context.drawing is not None:
            self._file.graph(*context.drawing)
        objectives = _objectives(context.job)
        if context.hyperparameters:
            self._file.hyperparameters(context.hyperparameters, objectives)
        if context.resumed_at is None:
            self._file.layout(dict.fromkeys(["loss", *(tag.rpartition("/")[2] for tag in objectives)]))

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        self._file.scalars(values, at.step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._file.text(tag, text, step)

    def figures(self, values: Mapping[str, Any], step: int) -> None:
        self._file.figures(values, step)

    def close(self, ended_well: bool) -> None:
        self._file.close(ended_well)


def _objectives(job: Job) -> list[str]:
    """Return the tags that a sweep optimizes, or the monitored tag."""
    metric = job.sweep.metric or job.checkpoint.monitor or []
    return [metric] if isinstance(metric, str) else list(metric)
