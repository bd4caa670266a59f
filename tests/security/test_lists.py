"""Lists with one unreadable run, and text with control sequences for the terminal."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import cli
from launcher.cli.listing import rows
from launcher.cli.sweep_display import SweepDisplay
from launcher.cli.terminal import Display
from launcher.runs import RunDirectory, list_runs, results
from launcher.terminal_text import printable

ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b31m\x1bc\u202e[bold red]x[/] [link=http://x]"
RAW = ("\x1b", "\x07", "\x9b", "\u202e")


def _result(**content: object) -> Callable[[Path], object]:
    return lambda run: (run / "result.json").write_text(json.dumps({"status": "completed", **content}))


def _text(text: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / "result.json").write_bytes(text.encode() if isinstance(text, str) else text)


BROKEN: dict[str, Callable[[Path], object]] = {
    "nested": _text('{"status": ' + "[" * 5000 + "]" * 5000 + "}"),
    "nested mappings": _text('{"status": ' + '{"a":' * 5000 + "1" + "}" * 5001),
    "a list": _text("[]"),
    "a text": _text('"completed"'),
    "nothing": _text("null"),
    "empty": _text(""),
    "half": _text('{"status": "comp'),
    "binary": _text(bytes(range(256)) * 10),
    "a number of 5000 digits": _text('{"status": "completed", "steps": ' + "9" * 5000 + "}"),
    "a large number": _result(steps=10**300),
    "infinite": _text('{"status": "completed", "seconds": Infinity}'),
    "NaN": _text('{"status": "completed", "cost_usd": NaN}'),
    "text for a number": _result(seconds="long"),
    "a mapping for a number": _result(steps={"a": 1}),
    "true for a number": _result(workers=True),
    "metrics are a list": _result(metrics=[1]),
    "a metric is a text": _result(metrics={"train/loss": "low"}),
    "best is a list": _result(best=[1]),
    "best is a text": _result(best="first"),
    "best lacks its value": _result(best={"tag": "val/loss"}),
    "status is a list": _result(status=["completed"]),
    "error is a mapping": _result(error={"a": 1}),
    "a FIFO": lambda run: os.mkfifo(run / "result.json"),
    "a directory": lambda run: (run / "result.json").mkdir(),
    "a link to a file": lambda run: (run / "result.json").symlink_to("/etc/passwd"),
    "a link to nothing": lambda run: (run / "result.json").symlink_to("/nothing"),
    "a link to /": lambda run: (_result()(run), os.symlink("/", run / "checkpoints")),  # type: ignore[func-returns-value]
    "a FIFO beside": lambda run: (_result()(run), os.mkfifo(run / "log.txt")),  # type: ignore[func-returns-value]
    "itself a link to /": lambda run: (os.rmdir(run), os.symlink("/", run)),  # type: ignore[func-returns-value]
    "a status that is a number": _result(status=3),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run root with one intact run."""
    good = RunDirectory(tmp_path / "runs" / "good")
    good.create()
    good.write_result({"status": "completed", "steps": 8, "metrics": {"train/loss": 0.5}, "seconds": 2.0})
    good.log.write_text("step 8\n")
    return good.path.parent


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_run_hides_no_other(root: Path, name: str) -> None:
    (root / "bad").mkdir()
    BROKEN[name](root / "bad")
    found = {row["name"]: row for row in rows(root)}
    assert (found["good"]["status"], found["good"]["loss"]) == ("completed", 0.5)
    assert found["bad"]["status"] == "unreadable"
    assert str(root / "bad") in found["bad"]["error"]


@pytest.mark.parametrize("name", ["nested", "a FIFO"])
def test_commands_about_one_broken_run(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "bad").mkdir()
    BROKEN[name](root / "bad")
    assert cli.run(["runs", f"run.root={root}"]) == 0
    shown = capsys.readouterr()
    assert "0.5000" in shown.out
    assert "unreadable" in shown.out
    assert "bad: " in shown.err
    assert cli.run(["runs", "--json", f"run.root={root}"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {"good", "bad"}

    assert cli.run(["logs", "good", "--no-follow", f"run.root={root}"]) == 0
    for words in (["stop", "bad"], ["run.like=bad"], ["run.name=bad", "run.resume=true"]):
        assert cli.run([*words, f"run.root={root}"]) == 2
    assert "bug in launch" not in capsys.readouterr().err


def test_a_run_that_may_not_be_read_hides_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "bad").mkdir()
    _result()(root / "bad")
    listed, scanned = os.listdir, os.scandir

    def denied(act: Callable[..., object]) -> Callable[..., object]:
        def call(path: object) -> object:
            if str(path).endswith("bad"):
                raise PermissionError(13, "Permission denied", str(path))
            return act(path)

        return call

    monkeypatch.setattr(os, "listdir", denied(listed))
    monkeypatch.setattr(os, "scandir", denied(scanned))
    found = {row["name"]: row["status"] for row in rows(root)}
    assert found == {"good": "completed", "bad": "unreadable"}


def test_a_diverged_run_is_readable_and_its_json_is_strict(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _text(
        '{"status": "failed", "metrics": {"train/loss": NaN}, "best": {"tag": "a", "value": Infinity, "step": null}}'
    )(root / "good")
    assert cli.run(["runs", "--json", f"run.root={root}"]) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (row["status"], row["loss"], row["best"]["value"]) == ("failed", None, None)
    assert cli.run(["runs", f"run.root={root}"]) == 0
    assert "nan" in capsys.readouterr().out


def test_our_own_results_are_readable() -> None:
    from launcher.jobs.record import _EMPTY_RESULT

    assert results.problem_of(_EMPTY_RESULT) is None


# ---- the terminal ---------------------------------------------------------------------------------------------------


def test_control_sequences_of_a_run_are_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(root / f"name {ESCAPE.replace('/', '')}")
    run.create()
    content = {"status": f"completed{ESCAPE}", "best": {"tag": ESCAPE, "value": 1.0, "step": 1}}
    run.write_result(content)
    (root / "bad").mkdir()
    (root / "bad" / "result.json").write_text(json.dumps({"metrics": {ESCAPE: "text"}}))
    RunDirectory(root / "good").log.write_text(f"\x1b[31mred\x1b[0m {ESCAPE}\n")
    assert cli.run(["runs", f"run.root={root}"]) == 0
    assert cli.run(["logs", "good", "--no-follow", f"run.root={root}"]) == 0
    assert cli.run(["logs", f"good{ESCAPE}", f"run.root={root}"]) == 2
    shown = capsys.readouterr()
    for raw in RAW:
        assert raw not in shown.out + shown.err
    assert "[bold red]x[/]" in shown.out, "it was read as markup"
    assert "\nred \\x1b]0;title" in shown.out


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "note", "text": ESCAPE},
        {"kind": "line", "rank": 0, "text": ESCAPE, "whole": True},
        {"kind": "phase", "name": ESCAPE},
    ],
)
def test_control_sequences_of_remote_events_are_removed(event: dict[str, object]) -> None:
    stream = io.StringIO()
    with Display(stream=stream) as display:
        display.show(event)
    with SweepDisplay(stream=stream) as sweep:
        sweep.trial(1, event)
    assert not [raw for raw in RAW if raw in stream.getvalue()]


def test_colours_of_user_code_are_kept() -> None:
    assert printable("\x1b[1;31mred\x1b[0m\x1b[2J", colours=True) == "\x1b[1;31mred\x1b[0m\\x1b[2J"
    assert printable("tab\tline\nbreak\r\x85é中") == "tab\tline\nbreak\\x0d\\x85é中"
    assert list(list_runs("/nothing")) == []
