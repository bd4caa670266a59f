"""Encodes events of a run as lines of text on a stream that other code writes to as well."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from launcher.config import masking

Event = dict[str, Any]
BEAT_SECONDS = 10.0


def mark_of(job: str) -> str:
    """Return the prefix of an event's line. It contains the id of the job, so that no other output begins with it."""
    return f"\x1e{job} "


class EventWriter:
    """Writes events to a file descriptor, one per line, from any thread.

    Within its `with` block, it writes an event `beat` every ten seconds, so that readers detect a lost connection.
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
        # It begins with a newline, since other code may have printed an unfinished line. Secrets are masked, since
        # Ray writes the output of a job to a file on the head.
        text = f"\n{self._mark}{masking.hide(json.dumps(event, default=str))}\n".encode()
        with self._lock, suppress(OSError):  # a full disk of the head must not end the run
            while text:
                text = text[os.write(self._descriptor, text) :]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.send({"kind": "beat"})


class EventReader:
    """Decodes the events in text that arrives in pieces of any length.

    Attributes:
        others: the last lines that were not events, for an error message.
    """

    MOST = 40

    def __init__(self, job: str) -> None:
        self._mark = mark_of(job)
        self._rest = ""
        self.others: list[str] = []

    def feed(self, text: str) -> Iterator[Event]:
        """Yield the events that are completed by `text`."""
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
