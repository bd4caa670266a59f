"""A sweep that the head of a cluster drives: sent from here, told from there, event by event.

caller's end    run        sends it off and follows it        Heard      events -> a SweepObserver
head's end      Telling    a SweepObserver -> events          ended      an outcome -> plain data
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from launcher.jobs.prepare import Prepared
from launcher.runs import RunDirectory
from launcher.sweeps.meaning import Meant
from launcher.sweeps.observer import Headline, SweepObserver, SweepOutcome
from launcher.sweeps.planning import check_values

Event = dict[str, Any]


def run(meant: Meant, observer: SweepObserver) -> SweepOutcome:
    """Send a sweep to the cluster that its configuration names, and follow it.

    Raises:
        ConfigError: a value cannot be; nothing was started.
        LaunchError: what its driver ended with.
        Stopped: a second signal; the sweep goes on stopping there.
    """
    from launcher.jobs.remote.caller import Caller
    from launcher.runners.signals import Interrupts

    check_values(meant)
    directory, heard = meant.directory, Heard(meant.directory, observer)

    def sent(where: str) -> None:
        observer.sent(directory, where)

    prepared = Prepared(meant.first, directory, resumes=meant.resumes)
    with Interrupts() as interrupts:
        most = min(meant.total, meant.settings.concurrency or meant.total)
        caller = Caller(meant.request, prepared, sent, heard.event, observer.asked_to_end, trials=most)
        ended = caller.train(interrupts)
    more = ended.more
    return SweepOutcome(
        ended.result, directory, more.get("trials", []), more.get("best"), ended.signal_number, ended.detached
    )


class Heard:
    """Tells an observer what events say of a sweep. Only what changed of its table is sent."""

    def __init__(self, directory: RunDirectory, observer: SweepObserver) -> None:
        self._directory, self._observer = directory, observer
        self._rows: dict[int, dict[str, Any]] = {}

    def event(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "begun":
            self._observer.begun(self._directory, Headline(**event["headline"]))
        elif kind == "trial":
            self._observer.trial(event["number"], event["event"])
        elif kind == "changed":
            self._rows.update({row["number"]: row for row in event["rows"]})
            self._observer.changed([self._rows[number] for number in sorted(self._rows)], event["facts"])
        elif kind == "said":
            self._observer.say(event["text"])
        else:
            self._observer.event(event)


class Telling(SweepObserver):
    """Makes events of what an observer is told."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._rows: dict[int, dict[str, Any]] = {}

    def event(self, event: Event) -> None:
        self._send(event)

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self._send({"kind": "begun", "headline": asdict(headline)})

    def trial(self, number: int, event: Event) -> None:
        self._send({"kind": "trial", "number": number, "event": event})

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        rows = [row for row in table if self._rows.get(row["number"]) != row]
        self._rows.update({row["number"]: row for row in rows})
        self._send({"kind": "changed", "rows": rows, "facts": dict(facts)})

    def say(self, text: str) -> None:
        self._send({"kind": "said", "text": text})


def ended(outcome: SweepOutcome) -> dict[str, Any]:
    """Return what is told of a sweep's end beside its result."""
    return {"trials": outcome.trials, "best": outcome.best}
