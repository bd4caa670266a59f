"""Sends events from workers to the driver, and requests to workers, through the key-value store of the Ray cluster.

It needs no actor, process or port: the driver reads and deletes the events that workers store, and workers read one key
of the driver. The training loop never waits for the store: a thread on each worker accesses it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from launcher.ray_seam import kv
from launcher.runners import clock

INTERVAL = 0.3  # seconds between two accesses to the store


def wait_for(key: str, seconds: float) -> str:
    """Wait until a key of the store has a value, and return it.

    Raises:
        TimeoutError: the key had no value within `seconds`.
    """
    end = time.monotonic() + seconds
    while (value := kv.get(key)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"timed out waiting for {key} after {seconds:g} seconds")
        time.sleep(0.02)
    return value


class WorkerEnd:
    """The `Control` of a Ray Train worker.

    `requests` reads from memory. `emit` appends to a list that a thread sends in batches; all events are in the store
    when the `with` block has ended.

    Args:
        run: the key of the run in the store.
        attempt: the number of the worker group within the run. It separates the last events of a group that has died
            from those of the next group.
    """

    def __init__(self, run: str, rank: int, interval: float = INTERVAL, attempt: int = 1) -> None:
        self._run = run
        self._rank = rank
        self._attempt = attempt
        self._interval = interval
        self._batches = 0
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()  # keeps the batches of one rank in the order of their numbers
        self._requests: frozenset[str] = frozenset()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._communicate, name="launch-control", daemon=True)

    def __enter__(self) -> WorkerEnd:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        self.flush()

    def requests(self) -> frozenset[str]:
        return self._requests

    def emit(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def send(self, event: dict[str, Any]) -> None:
        """Emit an event, and send it and all earlier ones immediately."""
        self.emit(event)
        self.flush()

    def clock_difference(self) -> clock.ClockDifference:
        """Start to measure the difference between this machine's clock and the driver's."""
        return clock.ClockDifference(self._run, self._attempt, self.send)

    def flush(self) -> None:
        """Send the emitted events."""
        with self._lock:
            events, self._events = self._events, []
            if not events:
                return
            key = f"{self._run}/event/{self._attempt:06d}/{self._rank:05d}/{self._batches:09d}"
            kv.put(key, json.dumps(events, default=str))
            self._batches += 1

    def _communicate(self) -> None:
        while not self._ended.wait(self._interval):
            # If the store does not answer, training continues, and the next round retries.
            with contextlib.suppress(Exception):
                self.flush()
                requests = json.loads(kv.get(f"{self._run}/requests") or "{}")
                self._requests = frozenset(what for what, of in requests.items() if of in (None, self._attempt))


class DriverEnd:
    """The driver's end of the channel: receives the events of all workers, and sends requests to them."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._requests: dict[str, int | None] = {}

    def request(self, what: str, attempt: int | None = None) -> None:
        """Request `what` ("stop", "checkpoint", …) from all workers until the run ends, or from one attempt only."""
        if self._requests.get(what, 0) != attempt:
            self._requests[what] = attempt
            kv.put(f"{self.run}/requests", json.dumps(self._requests))

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call, sorted by attempt; the events of each rank are in order."""
        events: list[dict[str, Any]] = []
        for key in kv.keys(f"{self.run}/event/"):
            batch = kv.get(key)
            kv.delete(key)
            for event in json.loads(batch) if batch else ():
                if event.get("kind") == "clock":
                    clock.answer(event)
                else:
                    events.append(event)
        return events

    def close(self) -> None:
        """Delete all keys of this run."""
        with contextlib.suppress(Exception):  # the cluster may have ended
            kv.delete_all(f"{self.run}/")
