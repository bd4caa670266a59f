"""Sweeps on a remote cluster: events from the head to the caller, and checks before the submission."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_fixtures import HERE, PROJECT, Sweep

from launcher.errors import ConfigError
from launcher.jobs.prepare import Request
from launcher.jobs.remote.location import RunLocation
from launcher.runs import RunDirectory
from launcher.sweeps import api as sweeps
from launcher.sweeps.observer import Headline, SweepObserver
from launcher.sweeps.remote import ROWS, EventReceiver, EventSender


class Listener(SweepObserver):
    """Records all of its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self.calls.append(("begun", directory.name, headline))

    def trial(self, number: int, event: dict[str, Any]) -> None:
        self.calls.append(("trial", number, event))

    def changed(self, table: list[dict[str, Any]], facts: Any) -> None:
        self.calls.append(("changed", [dict(row) for row in table], dict(facts)))

    def say(self, text: str) -> None:
        self.calls.append(("text", text))

    def event(self, event: dict[str, Any]) -> None:
        self.calls.append(("event", event))


def test_the_observer_receives_the_calls_of_the_head(tmp_path: Path) -> None:
    sent: list[str] = []
    sender, listener = EventSender(lambda event: sent.append(json.dumps(event))), Listener()
    rows = [{"number": number, "state": "waiting", "objective": None} for number in range(2 * ROWS + 10)]
    headline = Headline("many trials", ["optimizer.lr"], len(rows))
    note = {"kind": "note", "text": "step"}
    sender.event({"kind": "phase", "name": "ray"})
    sender.begun(RunDirectory(tmp_path / "there"), headline)
    sender.changed(rows, {"best": None, "seconds_left": None})
    later = [{**row, "state": "running"} if row["number"] == 7 else row for row in rows]
    sender.trial(7, note)
    sender.changed(later, {"best": 7, "seconds_left": 2.5})
    sender.say("trial 7 completed")

    receiver = EventReceiver(RunDirectory(tmp_path / "s"), listener)
    for line in sent:
        receiver.event(json.loads(line))

    assert listener.calls == [
        ("event", {"kind": "phase", "name": "ray"}),
        ("begun", "s", headline),
        ("changed", rows, {"best": None, "seconds_left": None}),
        ("trial", 7, note),
        ("changed", later, {"best": 7, "seconds_left": 2.5}),
        ("text", "trial 7 completed"),
    ]
    assert receiver.table() == later
    assert max(map(len, sent)) < 100_000, "Ray drops lines that are too long"
    assert len(sent[-2]) < 300, "the whole table is sent for one changed row"


def test_progress_is_sent_rarely_and_values_always() -> None:
    sent: list[dict[str, Any]] = []
    sender = EventSender(sent.append)
    for step in range(100):
        sender.trial(0, {"kind": "progress", "step": step, "values": {"train/loss": 1.0} if step % 10 == 5 else {}})
    assert [each["event"]["step"] for each in sent] == [0, 5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


def test_a_finished_sweep_starts_no_cluster(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep("optimizer.lr=0.1,0.2", "run.name=s")
    RunLocation("launch-1", head="gone", directory="/there/s", config_dir=str(PROJECT)).write(
        RunDirectory(tmp_path / "s")
    )
    monkeypatch.setattr("launcher.jobs.remote.submit.Submission.train", None)
    listener = Listener()
    words = [f"run.root={tmp_path}", "run.name=s", "run.resume=true", "cluster=ssh", "cluster.hosts=[vm1]"]

    outcome = sweeps.run(Request(words, calling=HERE), listener)

    assert [headline.finished for _, _, headline in listener.calls] == [True]
    assert (outcome.result["status"], outcome.trials, outcome.best) == ("completed", found["trials"], found["best"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["run.root=head:///var/runs"], "or remove run.root"),
        (["optimizer.lr=0.1,high"], "optimizer.lr is 'high'"),
    ],
)
def test_invalid_sweeps_are_rejected_before_a_cluster_starts(
    words: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.setattr("launcher.jobs.remote.submit.Submission.train", None)
    asked = [*words, "optimizer.lr=0.1,0.2", "cluster=ssh", "cluster.hosts=[vm1]", *more]
    with pytest.raises(ConfigError, match=message):
        sweeps.run(Request(asked, PROJECT), Listener())
