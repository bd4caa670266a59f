"""Reports how long a step, a save and an evaluation take, for requests with a deadline (an eviction notice)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from launcher.engine.checkpoint import SavedCheckpoint

_CHANGE = 1.25  # report again if one of the durations has changed by this factor


class Pace:
    """Records the seconds of a step, of a save until it is durable, and of an evaluation, and emits them as an event.

    The event `pace` has step_seconds (mean of the last interval), save_seconds (the longest of the last three saves
    over all ranks, plus the upload to an object store; None before the first save), and evaluation_seconds (of the last
    evaluation; 0 before the first).
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._saves: deque[SavedCheckpoint] = deque(maxlen=3)
        self._evaluation = 0.0
        self._reported: dict[str, float | None] = {}

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self._evaluation = perf_counter() - began

    def update(self, step_seconds: float, newest: SavedCheckpoint | None, upload_seconds: float | None = 0.0) -> None:
        """Record the durations of an interval; emit an event if one of them has changed by 25%.

        Args:
            upload_seconds: duration of an upload to the object store of the run; None if it is not known yet.
        """
        if newest is not None and (not self._saves or self._saves[-1] is not newest):
            self._saves.append(newest)
        longest = max((saved.seconds for saved in self._saves), default=None)
        figures = {
            "step_seconds": step_seconds,
            "save_seconds": None if longest is None or upload_seconds is None else longest + upload_seconds,
            "evaluation_seconds": self._evaluation,
        }
        if not self._reported or any(_differ(figures[name], self._reported[name]) for name in figures):
            self._reported = figures
            self._emit({"kind": "pace", **figures})


def _differ(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is not other
    least, most = sorted((one, other))
    return most > least * _CHANGE
