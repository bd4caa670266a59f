"""How long a run takes to answer: whoever asks for a checkpoint before a deadline must know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from launcher.engine.checkpoint import SavedCheckpoint

_CHANGE = 1.25  # told again when one of the figures has changed by so much


class Pace:
    """Keeps the seconds of a step, of a save until it is durable, and of an evaluation, and tells them as an event.

    Event `pace`: step_seconds (mean of the last interval), save_seconds (the longest of the last three saves, on all
    ranks together, and of sending them to an object store; None before the first), evaluation_seconds (of the last
    one; 0 before it).
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._saves: deque[SavedCheckpoint] = deque(maxlen=3)
        self._evaluation = 0.0
        self._told: dict[str, float | None] = {}

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self._evaluation = perf_counter() - began

    def look(self, step_seconds: float, newest: SavedCheckpoint | None, sending: float | None = 0.0) -> None:
        """Take the figures of an interval; tell them where they are news.

        Args:
            sending: seconds that a save takes to the object store of the run; None where nobody knows yet.
        """
        if newest is not None and (not self._saves or self._saves[-1] is not newest):
            self._saves.append(newest)
        longest = max((saved.seconds for saved in self._saves), default=None)
        figures = {
            "step_seconds": step_seconds,
            "save_seconds": None if longest is None or sending is None else longest + sending,
            "evaluation_seconds": self._evaluation,
        }
        if not self._told or any(_differ(figures[name], self._told[name]) for name in figures):
            self._told = figures
            self._emit({"kind": "pace", **figures})


def _differ(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is not other
    least, most = sorted((one, other))
    return most > least * _CHANGE
