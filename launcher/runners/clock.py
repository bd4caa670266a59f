"""The difference between the wall clocks of a worker's machine and the driver's machine.

The start of a run or trial and its startup phases are times on the driver's clock. A worker on a machine with another
clock converts them to its own clock, so that durations and costs are never differences between two clocks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.ray_seam import kv

# Smaller differences are within the precision of the measurement, and usual between synchronized clocks.
TOLERANCE_SECONDS = 0.5
ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.02


class ClockDifference:
    """Measures the difference in a thread: the driver answers an event with its time, and the thread waits for it.

    Args:
        run: the key of the run in the key-value store.
        attempt: the number of the worker group, so that an answer to an earlier group is not read.
        emit: sends an event to the driver immediately.
    """

    def __init__(self, run: str, attempt: int, emit: Callable[[dict[str, Any]], None]) -> None:
        self._key = f"{run}/clock/{attempt}"
        self._emit = emit
        self._seconds = 0.0
        self._measured = threading.Event()
        threading.Thread(target=self._measure, name="launch-clock", daemon=True).start()

    def _measure(self) -> None:
        with contextlib.suppress(Exception):  # if the store does not answer, the clocks are assumed to be equal
            self._emit({"kind": "clock", "key": self._key})
            end = time.monotonic() + ANSWER_SECONDS
            while (answer := kv.get(self._key)) is None and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            if answer is not None:
                difference = time.time() - float(answer)
                self._seconds = difference if abs(difference) > TOLERANCE_SECONDS else 0.0
        self._measured.set()

    def seconds(self) -> float:
        """Return by how many seconds this machine's clock is ahead; 0 if the driver has not answered in time."""
        self._measured.wait(ANSWER_SECONDS)
        return self._seconds


def answer(event: dict[str, Any]) -> None:
    """Answer a worker's event of kind "clock" with the time of this machine, the driver's."""
    kv.put(event["key"], repr(time.time()))


def convert(task: Any, seconds: float) -> None:
    """Convert the times of a task from the driver's clock to this machine's, which is ahead by `seconds`."""
    if seconds and hasattr(task, "marks"):
        task.started += seconds
        task.marks.begun = [(phase, at + seconds) for phase, at in task.marks.begun]
