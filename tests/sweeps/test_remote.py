"""A sweep that is told from elsewhere is the one that was driven there; and what is decided here before it is sent."""

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
    """Writes down all that it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self.told.append(("begun", directory.name, headline))

    def trial(self, number: int, event: dict[str, Any]) -> None:
        self.told.append(("trial", number, event))

    def changed(self, table: list[dict[str, Any]], facts: Any) -> None:
        self.told.append(("changed", [dict(row) for row in table], dict(facts)))

    def say(self, text: str) -> None:
        self.told.append(("said", text))

    def event(self, event: dict[str, Any]) -> None:
        self.told.append(("event", event))


def test_what_is_told_there_is_heard_here(tmp_path: Path) -> None:
    sent: list[str] = []
    telling, listener = EventSender(lambda event: sent.append(json.dumps(event))), Listener()
    rows = [{"number": number, "state": "waiting", "objective": None} for number in range(2 * ROWS + 10)]
    headline = Headline("many trials", ["optimizer.lr"], len(rows))
    note = {"kind": "note", "text": "step"}
    telling.event({"kind": "phase", "name": "ray"})
    telling.begun(RunDirectory(tmp_path / "there"), headline)
    telling.changed(rows, {"best": None, "seconds_left": None})
    later = [{**row, "state": "running"} if row["number"] == 7 else row for row in rows]
    telling.trial(7, note)
    telling.changed(later, {"best": 7, "seconds_left": 2.5})
    telling.say("trial 7 completed")

    heard = EventReceiver(RunDirectory(tmp_path / "s"), listener)
    for line in sent:
        heard.event(json.loads(line))

    assert listener.told == [
        ("event", {"kind": "phase", "name": "ray"}),
        ("begun", "s", headline),
        ("changed", rows, {"best": None, "seconds_left": None}),
        ("trial", 7, note),
        ("changed", later, {"best": 7, "seconds_left": 2.5}),
        ("said", "trial 7 completed"),
    ]
    assert heard.table() == later
    assert max(map(len, sent)) < 100_000, "Ray sends a line as a whole, or not at all"
    assert len(sent[-2]) < 300, "a table is told again for one row that changed"


def test_progress_is_told_now_and_then_and_values_always() -> None:
    sent: list[dict[str, Any]] = []
    telling = EventSender(sent.append)
    for step in range(100):
        telling.trial(0, {"kind": "progress", "step": step, "values": {"train/loss": 1.0} if step % 10 == 5 else {}})
    assert [each["event"]["step"] for each in sent] == [0, 5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


def test_a_finished_sweep_brings_up_no_cluster(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep("optimizer.lr=0.1,0.2", "run.name=s")
    RunLocation("launch-1", head="gone", directory="/there/s", config_dir=str(PROJECT)).write(
        RunDirectory(tmp_path / "s")
    )
    monkeypatch.setattr("launcher.jobs.remote.submit.Submission.train", None)
    listener = Listener()
    words = [f"run.root={tmp_path}", "run.name=s", "run.resume=true", "cluster=ssh", "cluster.hosts=[vm1]"]

    outcome = sweeps.run(Request(words, calling=HERE), listener)

    assert [headline.finished for _, _, headline in listener.told] == [True]
    assert (outcome.result["status"], outcome.trials, outcome.best) == ("completed", found["trials"], found["best"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["run.root=head:///var/runs"], "or leave it out"),
        (["optimizer.lr=0.1,high"], "optimizer.lr is 'high'"),
    ],
)
def test_what_cannot_be_is_told_before_a_cluster_is_brought_up(
    words: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], says: str
) -> None:
    monkeypatch.setattr("launcher.jobs.remote.submit.Submission.train", None)
    asked = [*words, "optimizer.lr=0.1,0.2", "cluster=ssh", "cluster.hosts=[vm1]", *more]
    with pytest.raises(ConfigError, match=says):
        sweeps.run(Request(asked, PROJECT), Listener())
