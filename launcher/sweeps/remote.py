"""A sweep that the head of a cluster drives: sent from here, told from there, event by event.

caller's end    run        sends it off and follows it        EventReceiver      events -> a SweepObserver
head's end      EventSender    a SweepObserver -> events          ended      an outcome -> plain data
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from launcher.errors import ConfigError
from launcher.jobs.prepare import Prepared
from launcher.runs import RunDirectory
from launcher.runs.storage import is_gathered
from launcher.sweeps import records
from launcher.sweeps.observer import Headline, SweepObserver, SweepOutcome
from launcher.sweeps.planning import check_values
from launcher.sweeps.specification import SweepSpec, save_user_record
from launcher.sweeps.study import Study

Event = dict[str, Any]
PROGRESS_SECONDS = 2.0  # between two signs of progress of a trial without values
ROWS = 500  # of the table in one event: a line of a job's log has a length that Ray still sends


def run(spec: SweepSpec, observer: SweepObserver) -> SweepOutcome:
    """Send a sweep to the cluster that its configuration names, and follow it.

    Raises:
        ConfigError: a value cannot be, or run.root is none for this; nothing was started.
        LaunchError: what its driver ended with.
        Stopped: a second signal; the sweep goes on stopping there.
    """
    from launcher.jobs.remote.submit import Submission
    from launcher.runners.signals import Interrupts

    if is_gathered(spec.root):
        raise ConfigError(
            f"run.root={spec.root} was asked for with cluster={spec.cluster.kind}, whose head drives it. Name a "
            "directory here, or leave it out: the sweep comes back to it."
        )
    check_values(spec)
    left = spec.total - _ended(spec)
    if left <= 0:  # no machine is rented for that
        return _finished(spec, observer)
    heard = EventReceiver(spec.directory, observer)

    def sent(where: str) -> None:
        observer.sent(spec.directory, where)

    save_user_record(spec)
    prepared = Prepared(spec.first, spec.directory, resumes=spec.resumes)
    most = min(left, spec.settings.concurrency or left)
    with Interrupts() as interrupts:
        submission = Submission(spec.request, prepared, sent, heard.event, observer.asked_to_end, trials=most)
        ended = submission.train(interrupts)
    return SweepOutcome(
        ended.result,
        spec.directory,
        heard.table(),
        ended.more.get("best"),
        ended.signal_number,
        spec.root,
        ended.detached,
    )


def _finished(spec: SweepSpec, observer: SweepObserver) -> SweepOutcome:
    study = Study(spec.directory.path, spec.space, spec.settings, spec.objectives, spec.total, None, None)
    keys = [axis.key for axis in spec.space.axes]
    observer.begun(spec.directory, Headline(spec.told(), keys, spec.total, finished=True))
    result = spec.directory.result()
    return SweepOutcome(result, spec.directory, records.rows(study), records.best(study), root=spec.root)


def _ended(spec: SweepSpec) -> int:
    """Return how many trials have ended, as far as it is known here."""
    if not spec.resumes:
        return 0
    counts = spec.directory.result().get("trials") or {}
    return sum(counts.get(state, 0) for state in ("completed", "pruned", "failed"))


class EventReceiver:
    """Tells an observer what events say of a sweep. Only what changed of its table is sent."""

    def __init__(self, directory: RunDirectory, observer: SweepObserver) -> None:
        self._directory, self._observer = directory, observer
        self._rows: dict[int, dict[str, Any]] = {}

    def table(self) -> list[dict[str, Any]]:
        """Return what is known of all trials, by number."""
        return [self._rows[number] for number in sorted(self._rows)]

    def event(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "begun":
            self._observer.begun(self._directory, Headline(**event["headline"]))
        elif kind == "trial":
            self._observer.trial(event["number"], event["event"])
        elif kind in ("rows", "changed"):
            self._rows.update({row["number"]: row for row in event["rows"]})
            if kind == "changed":
                self._observer.changed(self.table(), event["facts"])
        elif kind == "said":
            self._observer.say(event["text"])
        else:
            self._observer.event(event)


class EventSender(SweepObserver):
    """Makes events of what an observer is told: few and short ones, since whoever comes back reads all of them."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._rows: dict[int, dict[str, Any]] = {}
        self._told: dict[int, float] = {}  # when a trial's progress was told last

    def event(self, event: Event) -> None:
        self._send(event)

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self._send({"kind": "begun", "headline": asdict(headline)})

    def trial(self, number: int, event: Event) -> None:
        if event["kind"] == "progress":
            now = time.monotonic()
            if not event["values"] and now - self._told.get(number, -PROGRESS_SECONDS) < PROGRESS_SECONDS:
                return
            self._told[number] = now
        self._send({"kind": "trial", "number": number, "event": event})

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        rows = [row for row in table if self._rows.get(row["number"]) != row]
        self._rows.update({row["number"]: row for row in rows})
        while len(rows) > ROWS:
            self._send({"kind": "rows", "rows": rows[:ROWS]})
            rows = rows[ROWS:]
        self._send({"kind": "changed", "rows": rows, "facts": dict(facts)})

    def say(self, text: str) -> None:
        self._send({"kind": "said", "text": text})


def outcome_to_dict(outcome: SweepOutcome) -> dict[str, Any]:
    """Return what is told of a sweep's end beside its result; its trials are known."""
    return {"best": outcome.best}
