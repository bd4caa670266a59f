"""A sink for tests that records its calls in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from launcher.engine.sinks.base import Position, Sink, SinkContext, register


@register("recording")
class Recording(Sink):
    """Records its calls in order, as (method, arguments).

    Attributes:
        all: every instance that was opened in this process, for tests that cannot access the instance of a run.
    """

    visual = True
    all: ClassVar[list[Recording]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def open(self, context: SinkContext) -> None:
        self.all.append(self)
        self.calls.append(("open", (context,)))

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        self.calls.append(("scalars", (at, dict(values))))

    def text(self, tag: str, text: str, step: int) -> None:
        self.calls.append(("text", (tag, text, step)))

    def figures(self, values: Mapping[str, Any], step: int) -> None:
        self.calls.append(("figures", (dict(values), step)))

    def close(self, ended_well: bool) -> None:
        self.calls.append(("close", (ended_well,)))
