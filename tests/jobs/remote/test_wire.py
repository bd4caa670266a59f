"""Events between the lines of others: none is lost, repeated or made up, wherever the text is cut."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.local.kind import LocalCluster
from launcher.clusters.remote.ray_jobs import Unreachable, checked_url
from launcher.config.schema import ClusterConfig
from launcher.errors import ClusterError, DataError, HostError, UserCodeError, WorkerLost, from_dict, to_dict
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
            os.write(file.fileno(), b"half a line of somebody else")
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
    assert set(reader.others) == {"half a line of somebody else"}
    assert list(EventReader("launch-2").feed(stream(tmp_path)[1])) == []


class Dropping:
    """A job's log behind a network that drops after some characters of every connection."""

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
def test_every_line_comes_once_over_a_network_that_drops(tmp_path: Path, each: int) -> None:
    events, text = stream(tmp_path)
    followed: Any = Dropping(text, each)
    heard = list(follow.events(followed, "launch-1", "head", lambda: None, "a"))
    assert [event for event in heard if event["kind"] != "note"] == events
    notes = [event["text"] for event in heard if event["kind"] == "note"]
    assert bool(notes) is (each < len(text))
    if notes:
        assert "the run goes on there" in notes[0]
        assert notes[1] == "head answers again."


@pytest.mark.parametrize(("status", "says"), [("FAILED", "No module named torch"), ("GONE", "run.resume=true")])
def test_a_driver_that_ends_without_a_word_is_told(status: str, says: str) -> None:
    dead: Any = Dropping("Running entrypoint for job\nNo module named torch\n", 1000, status)
    with pytest.raises(WorkerLost, match=says):
        list(follow.events(dead, "launch-1", "head", lambda: None, "a"))


def test_a_cluster_that_never_answers_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "GIVE_UP_SECONDS", 0.0)

    class Dead(Dropping):
        def tail(self, job: str, skip: int) -> Iterator[str | None]:
            if skip >= 0:
                raise Unreachable("no route to host.")
            yield None

    dead: Any = Dead("", 1)
    with pytest.raises(WorkerLost, match="launch logs a"):
        list(follow.events(dead, "launch-1", "head", lambda: None, "a"))


def test_errors_come_back_as_what_they_were() -> None:
    """Would be wrong: a corrupt row found during training ends with 2 at one end and 1 at the other."""
    row = DataError("row 7")
    row.exit_status = 1  # as the engine sets it once training has begun
    for error in (row, DataError("no file"), HostError("no route", "vm1", "lost"), UserCodeError("KeyError: 1", "T…")):
        back = from_dict(json.loads(json.dumps(to_dict(error))))
        assert type(back) is type(error)
        assert (str(back), back.exit_status, vars(back)) == (str(error), error.exit_status, vars(error) | vars(back))
    bug = from_dict(to_dict(AssertionError("mine")))
    assert isinstance(bug, UserCodeError)
    assert "mine" in bug.traceback_text
    assert from_dict({"type": "sys", "message": "m"}).exit_status == 1


def test_the_place_of_a_run_is_kept_and_a_run_that_was_sent_is_found(tmp_path: Path) -> None:
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
    """After `launch down` its log is read from what was copied, and to stop it is a wrong request."""
    words = ["a", f"run.root={tmp_path}"]
    run = RunDirectory(tmp_path / "a")
    run.create()
    RunLocation("launch-1", head="pair", directory="/there/a").write(run)
    assert cli.run(["logs", *words]) == 2
    assert "was sent to the cluster pair, which is not known here any more" in capsys.readouterr().err
    assert cli.run(["stop", *words]) == 2
    assert "is not running: its cluster pair is not known here" in capsys.readouterr().err
    run.log.write_text("step 1\n")
    run.config.write_text("")
    (run.path / "result.json").write_text('{"status": "completed", "steps": 1}')
    assert cli.run(["logs", *words]) == 0
    shown = capsys.readouterr()
    assert (shown.out, "what was copied from it" in shown.err) == ("step 1\n", True)
    assert cli.run(["stop", *words]) == 2
    assert "is not running: it is completed." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "elsewhere"),
    [
        (ExistingCluster(address="http://head:8265"), True),
        (ExistingCluster(address="head:6379"), False),
        (ExistingCluster(), False),
        (LocalCluster(), False),
    ],
)
def test_who_drives_a_run(cluster: ClusterConfig, elsewhere: bool) -> None:
    assert is_remote(cluster) is elsewhere


@pytest.mark.parametrize("url", ["http://ada:secret@head:8265", "http://head:8265/?token=secret", "http://"])
def test_an_address_with_a_secret_is_refused_without_it(url: str) -> None:
    with pytest.raises(ClusterError) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)
