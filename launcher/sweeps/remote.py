"""Sweeps on a remote cluster, driven by its head: submission on the caller's side, and the events in between.

head      EventSender      converts the calls of a SweepObserver to events, as plain data
caller    EventReceiver    converts the events to calls of a SweepObserver
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from launcher.errors import ConfigError
from launcher.jobs.prepare import Prepared
from launcher.jobs.remote.submit import Submission
from launcher.runners.signals import Interrupts
from launcher.runs import RunDirectory
from launcher.runs.storage import is_gathered
from launcher.sweeps import records
from launcher.sweeps.observer import Headline, SweepObserver, SweepOutcome
from launcher.sweeps.planning import check_trials
from launcher.sweeps.specification import SweepSpec, save_user_record
from launcher.sweeps.study import Study

Event = dict[str, Any]
PROGRESS_SECONDS = 2.0  # minimum time between two progress events without values of one trial
ROWS = 500  # maximum number of rows in one event, because Ray limits the length of a line in a job's log


def run(spec: SweepSpec, observer: SweepObserver) -> SweepOutcome:
    """Submit a sweep to the cluster of its configuration, and follow it.

    Raises:
        ConfigError: a trial is invalid, or `run.root` cannot be used; nothing was started.
        LaunchError: the error of the driver on the head.
        Stopped: a second signal; the driver continues to stop the sweep.
    """
    if is_gathered(spec.root):
        raise ConfigError(
            f"run.root={spec.root} cannot be used with cluster={spec.cluster.kind}, because the head of the cluster "
            "drives the sweep. Use a local directory, or remove run.root: the sweep is copied to this machine.",
            key="run.root",
        )
    check_trials(spec)
    left = spec.total - _ended(spec)
    if left <= 0:
        return _finished(spec, observer)
    receiver = EventReceiver(spec.directory, observer)

    def sent(where: str) -> None:
        observer.sent(spec.directory, where)

    save_user_record(spec)
    prepared = Prepared(spec.first, spec.directory, resumes=spec.resumes)
    most = min(left, spec.settings.concurrency or left)
    with Interrupts() as interrupts:
        submission = Submission(spec.request, prepared, sent, receiver.event, observer.asked_to_end, trials=most)
        ended = submission.train(interrupts)
    return SweepOutcome(
        ended.result,
        spec.directory,
        receiver.table(),
        ended.more.get("best"),
        ended.signal_number,
        spec.root,
        ended.detached,
        spec.settings.exit,
    )


def _finished(spec: SweepSpec, observer: SweepObserver) -> SweepOutcome:
    settings, trust = spec.settings, spec.first.job.trust
    study = Study(spec.directory.path, spec.space, settings, spec.objectives, spec.total, None, None, trust=trust)
    observer.begun(spec.directory, Headline(spec.summary(), spec.space.keys, spec.total, finished=True))
    return SweepOutcome(
        spec.directory.result(),
        spec.directory,
        records.rows(study),
        records.best(study),
        root=spec.root,
        exit_rule=spec.settings.exit,
    )


def _ended(spec: SweepSpec) -> int:
    """Return the number of ended trials, according to the result.json on this machine."""
    if not spec.resumes:
        return 0
    counts = spec.directory.result().get("trials") or {}
    return sum(counts.get(state, 0) for state in ("completed", "pruned", "failed"))


class EventReceiver:
    """Passes the events of an `EventSender` to an observer. Events contain only the changed rows of the table."""

    def __init__(self, directory: RunDirectory, observer: SweepObserver) -> None:
        self._directory, self._observer = directory, observer
        self._rows: dict[int, dict[str, Any]] = {}

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of all trials so far, by number."""
        return [self._rows[number] for number in sorted(self._rows)]

    def event(self, event: Event) -> None:
        """Call the method of the observer for an event."""
        kind = event["kind"]
        if kind == "begun":
            self._observer.begun(self._directory, Headline(**event["headline"]))
        elif kind == "trial":
            self._observer.trial(event["number"], event["event"])
        elif kind in ("rows", "changed"):
            self._rows.update({row["number"]: row for row in event["rows"]})
            if kind == "changed":
                self._observer.changed(self.table(), event["facts"])
        elif kind == "message":
            self._observer.say(event["text"])
        else:
            self._observer.event(event)


class EventSender(SweepObserver):
    """Converts calls to events. They are few and short, because a caller that reattaches reads all of them."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._rows: dict[int, dict[str, Any]] = {}
        self._sent_at: dict[int, float] = {}  # time of the last progress event of each trial

    def event(self, event: Event) -> None:
        self._send(event)

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self._send({"kind": "begun", "headline": asdict(headline)})

    def trial(self, number: int, event: Event) -> None:
        if event["kind"] == "progress":
            now = time.monotonic()
            if not event["values"] and now - self._sent_at.get(number, -PROGRESS_SECONDS) < PROGRESS_SECONDS:
                return
            self._sent_at[number] = now
        self._send({"kind": "trial", "number": number, "event": event})

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        rows = [row for row in table if self._rows.get(row["number"]) != row]
        self._rows.update({row["number"]: row for row in rows})
        while len(rows) > ROWS:
            self._send({"kind": "rows", "rows": rows[:ROWS]})
            rows = rows[ROWS:]
        self._send({"kind": "changed", "rows": rows, "facts": dict(facts)})

    def say(self, text: str) -> None:
        self._send({"kind": "message", "text": text})


def outcome_to_dict(outcome: SweepOutcome) -> dict[str, Any]:
    """Return the part of an outcome that the head sends besides the result; its trials were sent as events."""
    return {"best": outcome.best}
