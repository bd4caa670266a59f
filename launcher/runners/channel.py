"""Events from the workers, requests to them, through the key-value store that every Ray cluster has.

No actor, no process, no port: the driver reads and deletes what workers have put, workers read one key of the driver's.
Neither end makes the training loop wait: a thread on each worker does the talking.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from launcher.ray_seam import kv

INTERVAL = 0.3  # seconds between two looks at the store


def publish(key: str, value: str) -> None:
    """Put `value` where `wait_for` finds it."""
    kv.put(key, value)


def wait_for(key: str, seconds: float) -> str:
    """Return the value of `key` once somebody has published it.

    Raises:
        TimeoutError: nobody did.
    """
    end = time.monotonic() + seconds
    while (value := kv.get(key)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"timed out waiting for {key} after {seconds:g} seconds")
        time.sleep(0.02)
    return value


class WorkerEnd:
    """The `Control` of a Ray Train worker.

    `requests` answers from memory. `emit` puts events into a list that the thread sends in batches; what was emitted
    before `close` is in the store when `close` returns. `attempt` is the number of the worker group within the run:
    what a dead group has sent last is told from what its successor sends.
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
        self._thread = threading.Thread(target=self._talk, name="launch-control", daemon=True)

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

    def flush(self) -> None:
        """Send what has been emitted."""
        with self._lock:
            events, self._events = self._events, []
            if not events:
                return
            key = f"{self._run}/event/{self._attempt:06d}/{self._rank:05d}/{self._batches:09d}"
            kv.put(key, json.dumps(events, default=str))
            self._batches += 1

    def _talk(self) -> None:
        while not self._ended.wait(self._interval):
            # The driver may be gone or busy: training goes on, and the next round tries again.
            with contextlib.suppress(Exception):
                self.flush()
                asked = kv.get(f"{self._run}/requests")
                wishes = json.loads(asked) if asked else {}
                self._requests = frozenset(what for what, of in wishes.items() if of in (None, self._attempt))


class DriverEnd:
    """The driver's end: what workers have emitted, and what is asked of them."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._asked: dict[str, int | None] = {}

    def request(self, what: str, attempt: int | None = None) -> None:
        """Ask all workers for `what` ("stop", "checkpoint") until the run ends, or those of one attempt alone."""
        if self._asked.get(what, 0) != attempt:
            self._asked[what] = attempt
            publish(f"{self.run}/requests", json.dumps(self._asked))

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call, those of one rank in their order, earlier attempts first."""
        events: list[dict[str, Any]] = []
        for key in kv.keys(f"{self.run}/event/"):
            batch = kv.get(key)
            kv.delete(key)
            events += json.loads(batch) if batch else []
        return events

    def close(self) -> None:
        """Remove everything of this run from the store."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            kv.delete_all(f"{self.run}/")
