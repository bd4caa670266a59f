"""Follows a job on a cluster: yields each of its events once, and reconnects after network failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from launcher.clusters.remote.ray_jobs import OVER, Jobs, Unreachable
from launcher.errors import WorkerLost
from launcher.jobs.remote.wire import BEAT_SECONDS, Event, EventReader

# Reconnect after so many seconds without a line: a connection that is half open returns no error.
SILENCE_SECONDS = 4 * BEAT_SECONDS
LOST_SECONDS = 900.0
_RETRY_SECONDS = 1.0


def events(jobs: Jobs, job: str, where: str, poll: Callable[[], None], name: str) -> Iterator[Event]:
    """Yield all events of a job in order. The last one is of kind `end`.

    After a lost connection, reading continues at the same position. An event of kind `note` reports the loss, and one
    the reconnection.

    Args:
        where: the name of the cluster, for messages.
        poll: called at least twice a second; it may raise an exception to stop.
        name: the name of the run, for messages.

    Raises:
        WorkerLost: the job ended without an event `end`, or the cluster did not answer for a quarter of an hour.
    """
    reader, seen = EventReader(job), 0
    answered = time.monotonic()
    lost: float | None = None
    while True:
        try:
            for text in jobs.tail(job, seen):
                poll()
                if text is None:
                    if time.monotonic() - answered > SILENCE_SECONDS:
                        break
                    continue
                if lost is not None:
                    yield _note(f"{where} answers again.")
                answered, lost = time.monotonic(), None
                seen += len(text)
                for event in reader.feed(text):
                    yield event
                    if event["kind"] == "end":
                        return
            status = jobs.status(job)
            answered = time.monotonic()
            if status in (*OVER, "GONE"):
                rest = "" if status == "GONE" else jobs.log(job)[seen:]
                for event in reader.feed(rest + "\n"):
                    yield event
                    if event["kind"] == "end":
                        return
                raise WorkerLost(_ended_silently(jobs, job, status, where, name, reader))
        except Unreachable as problem:
            now = time.monotonic()
            if lost is None:
                lost = now
                yield _note(f"{where} does not answer. The run continues there; reconnecting: {problem}")
            if now - lost > LOST_SECONDS:
                raise WorkerLost(
                    f"{where} has not answered for {LOST_SECONDS / 60:g} minutes. The run may continue there. "
                    f"Follow it again with: launch logs {name}."
                ) from None
            _wait(poll, _RETRY_SECONDS)


def _wait(poll: Callable[[], None], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        poll()
        time.sleep(0.1)


def _note(text: str) -> dict[str, Any]:
    return {"kind": "note", "text": text}


def _ended_silently(jobs: Jobs, job: str, status: str, where: str, name: str, reader: EventReader) -> str:
    if status == "GONE":
        return (
            f"{where} does not know the job {job}, because the Ray on its head was restarted. The run's checkpoints "
            f"are kept. Continue it with run.name={name} run.resume=true."
        )
    lines = [line for line in reader.others if not line.startswith("Running entrypoint")]
    text = " ".join(lines[-6:]) or jobs.message(job)[:600] or "no output"
    return f"The driver of the run on {where} (job {job}) ended as {status} without a result. Its last lines: {text}"
