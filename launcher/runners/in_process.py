"""Running a task in this process: alone, or as one of the ranks that torchrun or srun started. No Ray."""

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
    """Do the task here.

    Args:
        interrupts: entered already. The first Ctrl-C or SIGTERM asks the run to save and stop, the second ends it.

    Raises:
        Stopped: a second signal came, or one before training began.
        LaunchError: see `engine.entry.run`.
    """
    return entry.run(task, runtime, interrupts)


class DirectControl(Interrupts):
    """The engine's control of a run in this process: a signal that has come is the request.

    Args:
        shared: this process is one of several ranks. A terminal signals all of them, and torchrun passes on what it was
            sent itself, so that one Ctrl-C comes twice: what follows within a second is the same.
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
        if self.count > 1 or not self._training:  # no patience to wait, or nothing to save
            raise Stopped(number)
        # In a thread: here anything may be under way, such as a line that is being printed.
        threading.Thread(target=self._on_event, args=(STOPPING,), daemon=True).start()
