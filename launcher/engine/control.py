"""The one seam between the runner that supervises a run and the engine.

Requests come in (stop, checkpoint), events go out. Every request spreads to all ranks with the small vote that each
step takes anyway (`Runtime.vote`), so that all act on it at the same step and none blocks for it.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from launcher.runs import HEARTBEAT_SECONDS, RunDirectory

STOP = "stop"
# money.BUDGET: stop, since the money is spent; rank 0, which counts it, wishes so itself
PRUNE = "prune"  # stop, since others do better: nothing is saved for it
CHECKPOINT = "checkpoint"
REGROUP = "regroup"  # save and end, to be continued by another group of workers: raises `errors.Regroup`


class Control(Protocol):
    """What a runner hands to the engine."""

    def requests(self) -> frozenset[str]:
        """What is asked of the run now: a subset of {"stop", "budget", "prune", "checkpoint", "regroup"}.

        Called every step: no I/O, no waiting.
        """
        ...

    def emit(self, event: dict[str, Any]) -> None:
        """Take an event for the user. JSON types only; must not wait.

        Kinds: `phase` (name), `note` (text), `line` (rank, text: what the user's code printed), `progress` (step,
        total_steps, epoch, loss, samples_per_second, seconds_left), `pace` (see `launcher.engine.pace`) and `error`
        (rank, type, message, traceback, setup).
        """
        ...


class Heartbeat:
    """A thread of rank 0 that keeps the run's heartbeat and looks for `launch stop`.

    The file system is asked here, twice a second, so that the training loop never is.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="launch-watch", daemon=True)
        self.stop_requested = False

    def __enter__(self) -> Heartbeat:
        self._directory.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._ended.wait(0.5):
            # An unreadable or full disk must not end the thread: the training loop meets the same disk and reports it.
            try:
                self.stop_requested = self.stop_requested or self._directory.stop_requested()
                if time.monotonic() - beaten >= HEARTBEAT_SECONDS:
                    self._directory.beat()
                    beaten = time.monotonic()
            except OSError:
                continue
