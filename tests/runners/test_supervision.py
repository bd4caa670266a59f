"""The driver's supervision of a run: notes and errors for the user. The channel is a stub."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import CheckpointError, to_dict
from launcher.runners.signals import Interrupts
from launcher.runners.supervision import Limits, Supervision, explain

Event = dict[str, Any]


class Channel:
    """A channel with the events of a test."""

    run = "launch-test"

    def __init__(self) -> None:
        self.events: list[Event] = []

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events


class Cluster:
    existing = False


@pytest.fixture
def shown() -> list[Event]:
    return []


@pytest.fixture
def supervision(shown: list[Event]) -> Supervision:
    channel: Any = Channel()
    cluster: Any = Cluster()
    return Supervision(
        lambda: pytest.fail("a trainer was made"), channel, shown.append, Interrupts(), cluster, Limits(3, 1)
    )


def begin(supervision: Supervision, attempt: int, workers: int) -> None:
    channel: Any = supervision.channel
    channel.events = [{"kind": "phase", "name": "training", "attempt": attempt}]
    channel.events += [{"kind": "worker", "rank": rank, "attempt": attempt, "host": "a"} for rank in range(workers)]
    supervision._read_events()


def test_one_note_reports_another_number_of_workers(supervision: Supervision, shown: list[Event]) -> None:
    begin(supervision, 1, workers=2)
    for attempt, workers in ((2, 1), (3, 1), (4, 2)):
        supervision._reset(attempt)
        begin(supervision, attempt, workers)
    notes = [event["text"] for event in shown if event["kind"] == "note"]
    assert notes == [
        "Training continues with 1 worker instead of 2.",
        "Training continues with 2 workers instead of 1.",
    ]


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (["vm1", "vm2"], "step 8 in /runs: rank 1 on vm2: No space left on device"),
        (["vm1", "vm1"], "step 8 in /runs: rank 1: No space left on device"),
    ],
)
def test_an_error_names_the_host_of_its_rank(hosts: list[str], message: str) -> None:
    error = to_dict(CheckpointError("step 8 in /runs: rank 1: No space left on device"))
    events = [{"kind": "error", "rank": 0, "time": 1.0, "aftermath": False, "error": error}]
    workers = {rank: {"host": host} for rank, host in enumerate(hosts)}
    found = explain(RuntimeError(), workers, events)
    assert (type(found), str(found)) == (CheckpointError, message)
