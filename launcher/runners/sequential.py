"""Runs the tasks of a sweep one after another in this process, without Ray (`cluster=none`). `breakpoint()` works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.engine import entry
from launcher.engine.control import STOP
from launcher.engine.hardware import release_memory
from launcher.engine.runtime import Runtime
from launcher.errors import LaunchError, Stopped
from launcher.runners.signals import Interrupts
from launcher.runners.tasks import TaskOutcome

Event = dict[str, Any]


class Sequential:
    """A runner with the interface of `groups.Groups`. `submit` returns when the task has ended.

    Args:
        interrupts: entered already. The first signal requests a checkpoint and a stop, the second stops at once.
        on_event: called with the key of the task and each of its events.
    """

    def __init__(self, interrupts: Interrupts, on_event: Callable[[str, Event], None]) -> None:
        self._interrupts = interrupts
        self._on_event = on_event
        self._outcomes: list[TaskOutcome] = []
        self._requests: frozenset[str] = frozenset()
        self._key: str | None = None

    @property
    def running(self) -> set[str]:
        return set() if self._key is None else {self._key}

    def count(self) -> int:
        return 1

    def ready(self, shape: Any) -> bool:
        return not self._outcomes

    def submit(self, key: str, task: Any, shape: Any) -> None:
        self._key, self._requests = key, frozenset()
        runtime = Runtime.single(task.job.scaling.device)
        try:
            self._outcomes.append(TaskOutcome(key, entry.run(task, runtime, self)))
        except LaunchError as error:
            self._outcomes.append(TaskOutcome(key, error=error))
        finally:
            self._key = None
        release_memory(runtime.device)

    # ---- the engine's control ---------------------------------------------------------------------------------------

    def requests(self) -> frozenset[str]:
        if self._interrupts.count > 1:
            raise Stopped(self._interrupts.signal_number or 0)
        return self._requests | {STOP} if self._interrupts.count else self._requests

    def emit(self, event: Event) -> None:
        assert self._key is not None
        self._on_event(self._key, event)

    # ---- the driver's side ------------------------------------------------------------------------------------------

    def request(self, key: str, what: str) -> None:
        self._requests |= {what}

    def poll(self) -> list[TaskOutcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def release(self) -> None:
        """Do nothing: there are no warm workers."""

    def interrupt(self) -> None:
        """Do nothing: no task runs between two calls of `submit`, and a running task checks for signals itself."""

    def close(self) -> None:
        """Do nothing: no process was started."""
