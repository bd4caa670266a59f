"""Runs a task in this process without Ray: alone, or as one of the ranks that torchrun or srun started."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from launcher.engine import entry
from launcher.engine.control import STOP
from launcher.engine.entry import Task
from launcher.engine.runtime import Runtime
from launcher.errors import Stopped
from launcher.runners.signals import STOPPING, Interrupts

_SAME_SIGNAL_SECONDS = 1.0


def run(task: Task, runtime: Runtime, interrupts: DirectControl) -> dict[str, Any]:
    """Run the task in this process.

    Args:
        interrupts: entered already. The first signal requests a checkpoint and a stop, the second stops at once.

    Raises:
        Stopped: a second signal was received, or one before training started.
        LaunchError: see `engine.entry.run`.
    """
    return entry.run(task, runtime, interrupts)


class DirectControl(Interrupts):
    """The engine's `Control` of a run in this process. A signal is a request to stop.

    Args:
        shared: this process is one of several ranks. Both the terminal and torchrun send a signal to each rank on
            Ctrl-C, so a second signal within a second is ignored.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None], shared: bool = False) -> None:
        super().__init__()
        self._on_event = on_event
        self._shared = shared
        self._training = False
        self._last = -math.inf

    def requests(self) -> frozenset[str]:
        return frozenset({STOP}) if self.count else frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        self._training = self._training or (event["kind"] == "phase" and event["name"] == "training")
        self._on_event(event)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), self._last
        self._last = now
        if self._shared and now - before < _SAME_SIGNAL_SECONDS:
            return
        super()._take(number, frame)
        if self.count > 1 or not self._training:  # before training there is nothing to save
            raise Stopped(number)
        # In a thread: the signal may have interrupted any code, such as a print.
        threading.Thread(target=self._on_event, args=(STOPPING,), daemon=True).start()
