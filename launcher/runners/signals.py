"""Ctrl-C and SIGTERM as something to look at, instead of something that happens."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from launcher.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What the user is told after the first.
STOPPING = {"kind": "note", "text": "Stopping: the run saves a checkpoint first. A second time stops it at once."}


class Interrupts:
    """Counts the requests to stop while it is active: the first means "in order", the second "at once".

    Outside the main thread (a notebook's worker thread, say) Python allows no signal handlers: nothing is counted then.

    Attributes:
        count: how many signals have come.
        signal_number: the first of them; it decides the exit status (130 or 143).
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal_number: int | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Have a signal end what is under way with Stopped, where there is nothing to end in order."""
        self._at_once = True
        try:
            if self.signal_number is not None:
                raise Stopped(self.signal_number)
            yield
        finally:
            self._at_once = False

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.signal_number is None:
            self.signal_number = number
        if self._at_once:
            raise Stopped(number)
