"""A fake of Azure Scheduled Events: a server on loopback with responses that a test defines.

    python -m tests.support.scheduled_events VM PORT FILE

serves the current list of events in a file, on a machine of the test laboratory.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.support.servers import HttpServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def event(
    vm: str = "gpu-1", kind: str = "Preempt", not_before: float | str = "", identity: str = "E1", **more: Any
) -> dict[str, Any]:
    """Return one event in Azure's format. not_before: seconds since the epoch, or text."""
    return {
        "EventId": identity,
        "EventStatus": "Scheduled" if not_before else "Started",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [vm],
        "NotBefore": formatdate(not_before, usegmt=True) if isinstance(not_before, float) else not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    } | more


def body(text: str | bytes, status: int = 200, seconds: float = 0.0) -> Answer:
    """Return a response with this body, sent after `seconds`."""
    content = text.encode() if isinstance(text, str) else text

    def write(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return write


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a response."""
    handler.close_connection = True
    handler.connection.close()


class ScheduledEvents:
    """The service. `set` defines the current events, `script` the responses to the next requests instead."""

    def __init__(self, vm: str = "gpu-1", port: int = 0) -> None:
        self.vm = vm
        self.asked = 0
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._incarnation = 1
        self._script: list[Answer] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service._answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = HttpServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> ScheduledEvents:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def set(self, *events: dict[str, Any]) -> None:
        with self._lock:
            self._events = list(events)
            self._incarnation += 1

    def script(self, *answers: Answer) -> None:
        with self._lock:
            self._script += answers

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        if handler.headers.get("Metadata") != "true" or "api-version=" not in query:
            return body('{"error": "Bad request"}', 400)(handler)
        if path == "/metadata/instance/compute/name":
            return body(self.vm)(handler)
        if path != "/metadata/scheduledevents":
            return body("{}", 404)(handler)
        with self._lock:
            self.asked += 1
            document = {"DocumentIncarnation": self._incarnation, "Events": self._events}
            answer = self._script.pop(0) if self._script else body(json.dumps(document))
        return answer(handler)


def main(vm: str, port: str, file: str) -> None:
    with ScheduledEvents(vm, int(port)) as service:
        previous = None
        while True:
            if (text := Path(file).read_text()) != previous:
                previous = text
                service.set(*json.loads(text))
            time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
