"""A sink that writes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.engine.sinks.base import Position, Sink, register


@register("noop")
class Noop(Sink):
    """Discards all values, to measure the cost of other sinks."""

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        pass
