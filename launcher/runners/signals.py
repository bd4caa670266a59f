"""Counts Ctrl-C and SIGTERM instead of raising an exception."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from launcher.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The note after the first signal.
STOPPING = {"kind": "note", "text": "Stopping: the run saves a checkpoint first. A second signal stops it at once."}


class Interrupts:
    """Counts signals while it is entered. The first requests a graceful stop, the second an immediate one.

    Python allows signal handlers only in the main thread. In other threads, such as those of a notebook, nothing is
    counted.

    Attributes:
        count: the number of signals.
        signal_number: the first signal, which determines the exit status (130 or 143); None before it.
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
        """Raise Stopped on a signal in this block, in which there is nothing to stop gracefully."""
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
