"""The interface between the engine and the runner that supervises a run.

The runner passes requests (stop, checkpoint), the engine emits events. Each step's vote (`Runtime.vote`) distributes
the requests to all ranks, so that all ranks act on them at the same step and none blocks.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from launcher.runs import HEARTBEAT_SECONDS, RunDirectory

STOP = "stop"
# money.BUDGET: stop because the budget is spent; rank 0 counts the costs and requests it
PRUNE = "prune"  # stop a trial of a sweep that performs worse than others, without a checkpoint
CHECKPOINT = "checkpoint"
REGROUP = "regroup"  # save and raise `errors.Regroup`; another group of workers continues the run


class Control(Protocol):
    """The methods of a runner that the engine calls."""

    def requests(self) -> frozenset[str]:
        """Return the current requests, a subset of {"stop", "budget", "prune", "checkpoint", "regroup"}.

        Called at every step: must not block or do I/O.
        """
        ...

    def emit(self, event: dict[str, Any]) -> None:
        """Accept an event, which consists of JSON types. Must not block.

        Kinds: `phase` (name), `note` (text), `line` (rank, text: output of the user's code), `progress` (step,
        total_steps, epoch, loss, samples_per_second, seconds_left), `pace` (see `launcher.engine.pace`) and `error`
        (rank, type, message, traceback, setup).
        """
        ...


class Heartbeat:
    """A thread of rank 0 that updates the run's heartbeat file and polls for `launch stop`.

    The thread accesses the file system twice a second; the training loop never does.
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
            # An unreadable or full disk must not end the thread; the training loop reports it.
            try:
                self.stop_requested = self.stop_requested or self._directory.stop_requested()
                if time.monotonic() - beaten >= HEARTBEAT_SECONDS:
                    self._directory.beat()
                    beaten = time.monotonic()
            except OSError:
                continue
