"""Events of a run as lines of text: between others, on a stream that others write to as well."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from launcher.config import masking

Event = dict[str, Any]
BEAT_SECONDS = 10.0


def mark_of(job: str) -> str:
    """Return what a line of ours begins with. The job's id is in it, so that nothing else prints it by chance."""
    return f"\x1e{job} "


class EventWriter:
    """Writes events to a file descriptor, each as a line of its own, from any thread.

    A line every ten seconds says that the stream is alive, while the `with` block lasts.
    """

    def __init__(self, descriptor: int, job: str) -> None:
        self._descriptor, self._mark = descriptor, mark_of(job)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="launch-beat", daemon=True)

    def __enter__(self) -> EventWriter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def send(self, event: Event) -> None:
        # A new line first: somebody else may have printed half of one.
        # Ray keeps what a job prints in a file on the head.
        text = f"\n{self._mark}{masking.hide(json.dumps(event, default=str))}\n".encode()
        with self._lock:
            while text:
                text = text[os.write(self._descriptor, text) :]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.send({"kind": "beat"})


class EventReader:
    """Takes text in pieces of any length and gives the events in it; the lines of others are kept for an error.

    Attributes:
        others: the last lines that were no events.
    """

    MOST = 40

    def __init__(self, job: str) -> None:
        self._mark = mark_of(job)
        self._rest = ""
        self.others: list[str] = []

    def feed(self, text: str) -> Iterator[Event]:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            event = self._event(line)
            if event is not None:
                yield event
            elif line.strip():
                self.others = [*self.others, line][-self.MOST :]

    def _event(self, line: str) -> Event | None:
        if not line.startswith(self._mark):
            return None
        try:
            event = json.loads(line[len(self._mark) :])
        except ValueError:
            return None
        return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
