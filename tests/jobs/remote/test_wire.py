"""Events between other lines of a job's output: none is lost, repeated or invented."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.local.kind import LocalCluster
from launcher.clusters.remote.ray_jobs import Unreachable, checked_url
from launcher.config.schema import ClusterConfig
from launcher.errors import (
    ClusterError,
    ConfigError,
    DataError,
    HostError,
    UserCodeError,
    WorkerLost,
    from_dict,
    to_dict,
)
from launcher.jobs.remote import follow
from launcher.jobs.remote.location import RunLocation, is_remote, location_of
from launcher.jobs.remote.wire import EventReader, EventWriter
from launcher.runs import RunDirectory, find, list_runs


def stream(tmp_path: Path, job: str = "launch-1") -> tuple[list[dict[str, Any]], str]:
    events = [{"kind": "line", "rank": 0, "text": f'{number} "é\n\x1elaunch-1 {{}}'} for number in range(20)]
    path = tmp_path / "log"
    with path.open("ab") as file:
        writer = EventWriter(file.fileno(), job)
        for event in events:
            os.write(file.fileno(), b"an unfinished line")
            writer.send(event)
        writer.send({"kind": "end", "status": 0})
    return [*events, {"kind": "end", "status": 0}], path.read_text()


@pytest.mark.parametrize("seed", range(3))
def test_events_survive_any_cut(tmp_path: Path, seed: int) -> None:
    events, text = stream(tmp_path)
    cut = random.Random(seed)
    reader, found = EventReader("launch-1"), []
    while text:
        length = cut.randint(1, 60)
        found += list(reader.feed(text[:length]))
        text = text[length:]
    assert found == events
    assert set(reader.others) == {"an unfinished line"}
    assert list(EventReader("launch-2").feed(stream(tmp_path)[1])) == []


class Dropping:
    """The log of a job over a network that fails after some characters of each connection."""

    url = "http://head:8265"

    def __init__(self, text: str, each: int, status: str = "RUNNING") -> None:
        self.text, self.each, self.state = text, each, status

    def tail(self, job: str, skip: int) -> Iterator[str | None]:
        rest = self.text[skip:]
        yield None
        yield rest[: self.each] or None
        if len(rest) > self.each:
            raise Unreachable("connection reset.")

    def status(self, job: str) -> str:
        return self.state

    def log(self, job: str) -> str:
        return self.text

    def message(self, job: str) -> str:
        return ""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(follow, "_RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("each", [1, 17, 400, 100_000])
def test_every_event_arrives_once_over_a_network_that_fails(tmp_path: Path, each: int) -> None:
    events, text = stream(tmp_path)
    followed: Any = Dropping(text, each)
    found = list(follow.events(followed, "launch-1", "head", lambda: None, "a"))
    assert [event for event in found if event["kind"] != "note"] == events
    notes = [event["text"] for event in found if event["kind"] == "note"]
    assert bool(notes) is (each < len(text))
    if notes:
        # The first names the problem, the second reports that the connection is there again.
        assert all(note.startswith("head ") for note in notes[:2])
        assert ["connection reset." in note for note in notes[:2]] == [True, False]


@pytest.mark.parametrize(("status", "message"), [("FAILED", "No module named torch"), ("GONE", "run.resume=true")])
def test_a_driver_that_ends_without_a_result_is_an_error(status: str, message: str) -> None:
    dead: Any = Dropping("Running entrypoint for job\nNo module named torch\n", 1000, status)
    with pytest.raises(WorkerLost, match=message):
        list(follow.events(dead, "launch-1", "head", lambda: None, "a"))


def test_a_cluster_that_never_answers_again_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOST_SECONDS", 0.0)

    class Dead(Dropping):
        def tail(self, job: str, skip: int) -> Iterator[str | None]:
            if skip >= 0:
                raise Unreachable("no route to host.")
            yield None

    dead: Any = Dead("", 1)
    with pytest.raises(WorkerLost, match="launch logs a"):
        list(follow.events(dead, "launch-1", "head", lambda: None, "a"))


def test_errors_keep_class_data_and_exit_status() -> None:
    """A corrupt row that is found during training has exit status 1 at both ends."""
    row = DataError("row 7")
    row.exit_status = 1  # as the engine sets it once training has begun
    key = ConfigError("no such key", key="trainer.x")
    host = HostError("no route", "vm1", "lost")
    for error in (row, DataError("no file"), key, host, UserCodeError("KeyError: 1", "T…")):
        for back in (from_dict(json.loads(json.dumps(to_dict(error)))), pickle.loads(pickle.dumps(error))):
            assert type(back) is type(error)
            assert (str(back), back.exit_status) == (str(error), error.exit_status)
            assert vars(back) == vars(error) | vars(back)
    bug = from_dict(to_dict(AssertionError("mine")))
    assert isinstance(bug, UserCodeError)
    assert "mine" in bug.traceback_text
    assert from_dict({"type": "sys", "message": "m"}).exit_status == 1


def test_the_location_of_a_remote_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    run.create()
    assert location_of(run) is None
    RunLocation("launch-1", "http://head:8265").write(run)
    assert location_of(run) == RunLocation("launch-1", "http://head:8265")
    assert find(tmp_path, "a").status() == "sent"
    assert not run.exists()
    assert [one.name for one in list_runs(tmp_path)] == ["a"]
    (run.path / "remote.json").write_text("[]")
    assert location_of(run) is None


def test_a_run_outlives_its_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After `launch down` its copied log can be read, and `stop` is rejected."""
    words = ["a", f"run.root={tmp_path}"]
    run = RunDirectory(tmp_path / "a")
    run.create()
    RunLocation("launch-1", head="pair", directory="/there/a").write(run)
    assert cli.run(["logs", *words]) == 2
    assert re.search(r'"a" .*\bpair\b.*\brun\.name\b', capsys.readouterr().err)
    assert cli.run(["stop", *words]) == 2
    assert re.search(r'"a" .*\bpair\b', capsys.readouterr().err)
    run.log.write_text("step 1\n")
    run.config.write_text("")
    (run.path / "result.json").write_text('{"status": "completed", "steps": 1}')
    assert cli.run(["logs", *words]) == 0
    shown = capsys.readouterr()
    assert (shown.out, " pair " in shown.err) == ("step 1\n", True)
    assert cli.run(["stop", *words]) == 2
    assert re.search(r'"a" .* completed\.', capsys.readouterr().err)


@pytest.mark.parametrize(
    ("cluster", "remote"),
    [
        (ExistingCluster(address="http://head:8265"), True),
        (ExistingCluster(address="head:6379"), False),
        (ExistingCluster(), False),
        (LocalCluster(), False),
    ],
)
def test_which_clusters_are_remote(cluster: ClusterConfig, remote: bool) -> None:
    assert is_remote(cluster) is remote


@pytest.mark.parametrize("url", ["http://ada:secret@head:8265", "http://head:8265/?token=secret", "http://"])
def test_the_error_of_an_address_with_a_secret_does_not_show_it(url: str) -> None:
    with pytest.raises(ClusterError) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)
