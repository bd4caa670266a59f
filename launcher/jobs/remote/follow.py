"""Following a job on a cluster: its events as they come, each once, over networks that drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from launcher.clusters.remote.ray_jobs import OVER, Jobs, Unreachable
from launcher.errors import WorkerLost
from launcher.jobs.remote.wire import BEAT_SECONDS, Event, EventReader

# Without a line for so long the connection is made anew: one that is only half open says nothing.
SILENCE_SECONDS = 4 * BEAT_SECONDS
GIVE_UP_SECONDS = 900.0
_RETRY_SECONDS = 1.0


def events(jobs: Jobs, job: str, where: str, poll: Callable[[], None], name: str) -> Iterator[Event]:
    """Yield the events of a job from its first, and last of all the one of kind `end`.

    What was read is counted, so that after a lost connection reading goes on where it was. That it is lost, and that it
    is back, are events of kind `note`.

    Args:
        poll: called at least twice a second; it may raise to end this.
        name: of the run, for errors.

    Raises:
        WorkerLost: the job has ended without a word, or the cluster does not answer for a quarter of an hour.
    """
    reader, seen = EventReader(job), 0
    heard = time.monotonic()
    lost: float | None = None
    while True:
        try:
            for text in jobs.tail(job, seen):
                poll()
                if text is None:
                    if time.monotonic() - heard > SILENCE_SECONDS:
                        break
                    continue
                if lost is not None:
                    yield _note(f"{where} answers again.")
                heard, lost = time.monotonic(), None
                seen += len(text)
                for event in reader.feed(text):
                    yield event
                    if event["kind"] == "end":
                        return
            status = jobs.status(job)
            heard = time.monotonic()
            if status in (*OVER, "GONE"):
                rest = "" if status == "GONE" else jobs.log(job)[seen:]
                for event in reader.feed(rest + "\n"):
                    yield event
                    if event["kind"] == "end":
                        return
                raise WorkerLost(_without_a_word(jobs, job, status, where, name, reader))
        except Unreachable as problem:
            now = time.monotonic()
            if lost is None:
                lost = now
                yield _note(f"{where} does not answer; the run goes on there. Trying again: {problem}")
            if now - lost > GIVE_UP_SECONDS:
                raise WorkerLost(
                    f"{where} has not answered for {GIVE_UP_SECONDS / 60:g} minutes. The run may go on there; follow "
                    f"it again with: launch logs {name}."
                ) from None
            _wait(poll, _RETRY_SECONDS)


def _wait(poll: Callable[[], None], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        poll()
        time.sleep(0.1)


def _note(text: str) -> dict[str, Any]:
    return {"kind": "note", "text": text}


def _without_a_word(jobs: Jobs, job: str, status: str, where: str, name: str, reader: EventReader) -> str:
    said = [line for line in reader.others if not line.startswith("Running entrypoint")]
    text = " ".join(said[-6:]) or jobs.message(job)[:600] or "it printed nothing"
    if status == "GONE":
        return (
            f"{where} knows nothing of the job {job}: its head was started anew. What the run has saved is kept; "
            f"continue it with run.name={name} run.resume=true."
        )
    return f"The driver of the run on {where} (job {job}) ended without a word, as {status}. Its last lines: {text}"
