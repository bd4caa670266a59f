"""Whole texts on the terminal at several widths, without colour, and without a terminal.

`UPDATE_GOLDEN=1 pytest tests/test_golden.py` writes the files of tests/golden again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.sweep_display import SweepDisplay
from launcher.cli.terminal import Display
from launcher.sweeps.observer import Headline

GOLDEN = Path(__file__).with_name("golden")
PLACES: dict[str, dict[str, str]] = {
    "40": {"COLUMNS": "40", "TERM": "xterm"},
    "80": {"COLUMNS": "80", "TERM": "xterm"},
    "200": {"COLUMNS": "200", "TERM": "xterm"},
    "dumb": {"COLUMNS": "80", "TERM": "dumb"},
    "no-colour": {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"},
    "no-terminal": {"TERM": "xterm"},
}


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def training(stream: Any) -> None:
    """The lines of a run; the bar between them is drawn over."""
    display = Display(workers=2, stream=stream)
    display.say("digits: 2 CPU workers (this machine), global batch 50 = 2 x 25, 20 steps")
    for step in (10, 20):
        event: dict[str, Any] = {"kind": "progress", "step": step, "total_steps": 20, "epoch": step / 10, "loss": 0.5}
        values = {"train/loss": 0.5, "val/loss": 0.25, "val/accuracy": 0.9375}
        display.show(event | {"samples_per_second": 1234.5, "seconds_left": 65.0, "values": values})
    display.show({"kind": "line", "rank": 1, "text": "\x1b[31mred\x1b[0m " + "a long line of the user's code " * 3})


def sweep(stream: Any) -> None:
    """The table of a sweep at one moment."""
    from launcher.runs import RunDirectory

    display = SweepDisplay(stream)
    display.begun(
        RunDirectory(Path("runs/s")),
        Headline("3 trials, a grid over optimizer.lr, model", ["optimizer.lr", "model"], 3),
    )
    lr = [0.1, 0.01, 0.001]
    states = ["completed", "failed", "running"]
    objectives = [0.25, None, None]
    display._table = [
        {"number": n, "state": states[n], "objective": objectives[n], "optimizer.lr": lr[n], "model": "convnet"}
        for n in range(3)
    ]
    display._facts = {"best": 0, "seconds_left": 65.0}
    display._progress = {2: {"step": 7, "total_steps": 20}}
    display._console.print(display.picture())


@pytest.mark.golden
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("show", [training, sweep])
def test_the_text_on_the_terminal(show: Callable[[Any], None], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in PLACES[place].items():
        monkeypatch.setenv(variable, value)
    stream = Screen(terminal=place != "no-terminal")
    show(stream)
    file = GOLDEN / f"{show.__name__}-{place}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(stream.getvalue())
    assert stream.getvalue() == file.read_text()
