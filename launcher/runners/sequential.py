"""Tasks one after the other in this process: the sweeps of `cluster=none`, where `breakpoint()` works. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.engine.control import STOP
from launcher.errors import LaunchError, Stopped
from launcher.runners.signals import Interrupts

Event = dict[str, Any]


class Sequential:
    """Has the interface of `groups.Groups`; `submit` returns when the task has ended.

    Args:
        interrupts: entered already. The first signal asks the task to save and stop, the second ends it at once.
    """

    def __init__(self, interrupts: Interrupts, on_event: Callable[[str, Event], None]) -> None:
        self._interrupts = interrupts
        self._on_event = on_event
        self._ended: list[tuple[str, dict[str, Any] | None, LaunchError | None]] = []
        self._asked: frozenset[str] = frozenset()
        self._key: str | None = None

    @property
    def running(self) -> set[str]:
        return set() if self._key is None else {self._key}

    def count(self) -> int:
        return 1

    def ready(self, shape: Any) -> bool:
        return not self._ended

    def submit(self, key: str, task: Any, shape: Any) -> None:
        from launcher.engine import entry
        from launcher.engine.hardware import release_memory
        from launcher.engine.runtime import Runtime

        self._key, self._asked = key, frozenset()
        runtime = Runtime.single(task.job.scaling.device)
        try:
            self._ended.append((key, entry.run(task, runtime, self), None))
        except LaunchError as error:
            self._ended.append((key, None, error))
        finally:
            self._key = None
        release_memory(runtime.device)

    # ---- the engine's control ---------------------------------------------------------------------------------------

    def requests(self) -> frozenset[str]:
        if self._interrupts.count > 1:
            raise Stopped(self._interrupts.signal_number or 0)
        return self._asked | {STOP} if self._interrupts.count else self._asked

    def emit(self, event: Event) -> None:
        assert self._key is not None
        self._on_event(self._key, event)

    # ---- the driver's side ------------------------------------------------------------------------------------------

    def request(self, key: str, what: str) -> None:
        self._asked |= {what}

    def look(self) -> list[Any]:
        from launcher.runners.tasks import TaskOutcome

        ended, self._ended = self._ended, []
        return [TaskOutcome(*each) for each in ended]

    def release(self) -> None:
        """Nothing is kept warm but this process."""

    def interrupt(self) -> None:
        """Nothing runs between two calls of `submit`; a signal is seen by the task itself."""

    def close(self) -> None:
        """Nothing was started."""
