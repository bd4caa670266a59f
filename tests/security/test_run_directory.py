"""A run's directory from another person: its addresses are not used, and its links are not followed."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.errors import RunError
from launcher.jobs.remote.location import RunLocation, location_of
from launcher.runs import RunDirectory, mirror, plain_files, user_state

TOKEN = "token-of-the-user's-own-cluster"


class Listener(http.server.ThreadingHTTPServer):
    """A server that records the headers of each request."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.requests = 0
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listener.requests += 1
                listener.tokens += [self.headers["Authorization"]] if "Authorization" in self.headers else []
                self.send_error(404)

            do_POST = do_PUT = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run with a remote.json."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    made = RunDirectory(tmp_path / "runs" / "a")
    made.create()
    return made


def _planted(run: RunDirectory, **content: Any) -> RunLocation:
    place = RunLocation("launch-1", **content)
    (run.path / "remote.json").write_text(json.dumps(asdict(place)))
    return place


@pytest.mark.parametrize("verb", ["logs", "stop"])
def test_a_run_does_not_decide_where_a_token_goes(
    run: RunDirectory, listener: Listener, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _planted(run, address=listener.url)
    assert cli.run([verb, "a", f"run.root={run.path.parent}"]) == 2
    assert (listener.requests, listener.tokens) == (0, [])
    assert "remote.json" in capsys.readouterr().err


def test_a_record_of_another_run_confirms_nothing(run: RunDirectory, listener: Listener) -> None:
    """Neither a record of the same path with another location, nor one of another path with the same location."""
    user_state.save(
        run, place=asdict(RunLocation("launch-1", "http://127.0.0.1:9")), token=user_state.fingerprint(TOKEN)
    )
    stolen = _planted(run, address=listener.url)
    other = RunDirectory(run.path.parent / "b")
    user_state.save(other, place=asdict(stolen))
    assert location_of(run) is None
    assert cli.run(["logs", "a", f"run.root={run.path.parent}"]) == 2
    assert listener.requests == 0


@pytest.mark.parametrize(("sent_with", "received"), [(TOKEN, True), ("token of that cluster", False), (None, False)])
def test_a_token_is_sent_only_to_its_cluster(
    run: RunDirectory, listener: Listener, sent_with: str | None, received: bool
) -> None:
    place = RunLocation("launch-1", listener.url)
    place.write(run, token=sent_with and user_state.fingerprint(sent_with))
    assert cli.run(["stop", "a", f"run.root={run.path.parent}"]) == 2
    assert (f"Bearer {TOKEN}" in listener.tokens) is received


def test_an_override_on_the_command_line_confirms_an_address(run: RunDirectory, listener: Listener) -> None:
    """For a run that another machine submitted, and for a cluster with a new token."""
    _planted(run, address=listener.url)
    words = ["stop", "a", f"run.root={run.path.parent}"]
    assert cli.run([*words, "cluster.address=http://127.0.0.1:9"]) == 2
    assert listener.requests == 0
    assert cli.run([*words, f"cluster.address={listener.url}"]) == 2  # this server has no such job
    assert set(listener.tokens) == {f"Bearer {TOKEN}"}
    assert location_of(run) == RunLocation("launch-1", listener.url)


def test_copied_files_of_a_run_are_shown_without_a_connection(
    run: RunDirectory, listener: Listener, capsys: pytest.CaptureFixture[str]
) -> None:
    _planted(run, address=listener.url)
    run.log.write_text("step 1\n")
    assert cli.run(["logs", "a", f"run.root={run.path.parent}"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "step 1\n"
    assert "remote.json" in shown.err
    assert listener.requests == 0


# ---- links ----------------------------------------------------------------------------------------------------------

WRITERS = ("config.yaml", "overrides.yaml", "result.json", "log.txt", "metrics.jsonl", ".stop", "evaluations.jsonl")


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "a")
    made.create()
    made.config.write_text("{}\n")
    made.write_result({"status": "running", "steps": 1})
    made.log.write_text("step 1\n")
    made.beat()
    return made


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        *(("stop", name) for name in WRITERS),
        ("evaluate", "checkpoints"),
        ("export", "export"),
        ("train", "metrics.jsonl"),
    ],
)
def test_nothing_is_written_through_a_link(
    finished: RunDirectory, tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (finished.path / name).unlink(missing_ok=True)
    (finished.path / name).symlink_to(outside / "victim")
    root = f"run.root={finished.path.parent}"
    words = ["run.name=a", "run.resume=true", root] if verb == "train" else [verb, "a", root]
    assert cli.run(words) == 2
    assert list(outside.iterdir()) == []
    printed = capsys.readouterr().err
    assert f"{finished.path / name} " in printed
    assert "run.root" in printed, "the remedy of a link"


@pytest.mark.parametrize("kind", ["a FIFO", "a link"])
def test_only_regular_files_are_opened(finished: RunDirectory, kind: str) -> None:
    """Also after the check of the whole directory: another process may have changed it."""
    path = finished.path / "result.json"
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(finished.config)
    with pytest.raises(RunError, match=r"result\.json"):
        finished.result()
    with pytest.raises(OSError, match="result"):
        plain_files.open_file(path, "a")


def test_a_link_within_the_run_and_links_to_the_root_are_used(finished: RunDirectory, tmp_path: Path) -> None:
    (finished.path / "latest.txt").symlink_to("log.txt")
    (tmp_path / "other").symlink_to(finished.path.parent)
    assert cli.run(["logs", "a", "--no-follow", f"run.root={tmp_path / 'other'}"]) == 0


def test_a_prepared_name_for_a_temporary_file_is_not_followed(finished: RunDirectory, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (finished.path / f".result.json.{os.getpid()}.tmp").symlink_to(victim)
    finished.write_result({"status": "stopped"})
    assert (victim.read_text(), finished.result()) == ("mine", {"status": "stopped"})


def test_a_run_root_names_no_store(
    run: RunDirectory, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `.store` is used only if the user's own cache contains the copy of that root."""
    host = listener.url.removeprefix("http://")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
    monkeypatch.setenv("LAUNCH_AZURE_BLOB_AUTHORITY", host)
    monkeypatch.setenv("LAUNCH_AZURE_SCHEME", "http")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = "abfss://theirs@account.dfs.core.windows.net/runs"
    (run.path / "result.json").write_text('{"status": "completed", "steps": 1}')
    (run.path / "config.yaml").write_text("")
    (run.path.parent / ".store").write_text(uri)
    for words in (["runs"], ["logs", "a"], ["stop", "a"], ["evaluate", "a"]):
        assert cli.run([*words, f"run.root={run.path.parent}"]) in (0, 2)
    assert (run.uri, listener.requests) == (None, 0)

    own = mirror.cache_of(uri)
    assert RunDirectory(own / "a").uri == f"{uri}/a", "a root that this user's commands have made before keeps working"
    (own / ".store").write_text(uri.replace("theirs", "another"))
    assert RunDirectory(own / "a").uri is None
    (own / ".store").write_text(uri)
    (tmp_path / "linked").symlink_to(own)
    assert RunDirectory(tmp_path / "linked" / "a").uri == f"{uri}/a"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert RunDirectory(own / "a").uri is None
