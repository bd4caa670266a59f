"""The display of a run: formatted numbers, lines and the progress bar."""

from __future__ import annotations

import io
from typing import Any

import pytest

from launcher.cli.terminal import Display
from launcher.formatting import count, duration, number, size, step_line
from tests.support.command import TOY, Place


def progress(step: int, **values: float) -> dict[str, Any]:
    event: dict[str, Any] = {"kind": "progress", "step": step, "total_steps": 40, "epoch": step / 10, "loss": 0.5}
    return event | {"samples_per_second": 1234.5, "seconds_left": 65.0, "values": values}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (2.30259, "2.3026"), (1e-7, "1.000e-07"), (-3e8, "-3.000e+08")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("number_of_bytes", "text"),
    [(8, "8 B"), (1536, "1.5 KiB"), (351_864, "343.6 KiB"), (20 * 2**30, "20.0 GiB"), (2**50, "1,024.0 TiB")],
)
def test_size(number_of_bytes: int, text: str) -> None:
    assert size(number_of_bytes) == text


def test_count() -> None:
    assert [count(1, "step"), count(1.5, "epoch"), count(1037, "sample")] == ["1 step", "1.5 epochs", "1,037 samples"]


def test_lines_without_a_terminal() -> None:
    """One line for each log interval; events between them update only the bar."""
    stream = io.StringIO()
    with Display(workers=2, stream=stream) as display:
        display.show({"kind": "phase", "name": "workers"})
        display.show(progress(9))
        display.show(progress(10, **{"train/loss": 0.5}))
        display.show(progress(20, **{"train/loss": 0.5, "val/accuracy": 0.75, "val/loss": 0.25}))
        display.show({"kind": "line", "rank": 1, "text": "\x1b[31mmine\x1b[0m [bold]not markup[/bold] [7]"})
        display.show({"kind": "note", "text": "x" * 300})
    assert stream.getvalue().splitlines() == [
        "step 10/40  epoch 1.00  loss 0.5000  1,234 samples/s  1m05s left",
        "step 20/40  epoch 2.00  loss 0.5000  1,234 samples/s  1m05s left  val/loss 0.2500  val/accuracy 0.7500",
        "[rank 1] mine [bold]not markup[/bold] [7]",
        "x" * 300,
    ]


def test_the_last_step_has_no_time_left() -> None:
    assert step_line(progress(40)) == "step 40/40  epoch 4.00  loss 0.5000  1,234 samples/s"


def test_a_terminal_has_a_bar_and_the_debugger(place: Place, request: pytest.FixtureRequest) -> None:
    running = place.start(*TOY, "debug=pdb", "model.failure=pdb", "model.at=3", "run.name=a", terminal=True)
    request.addfinalizer(running.close)
    running.wait_for("(Pdb) ")
    running.type("p self.at * 14\n")
    running.wait_for("42")
    running.type("c\n")
    done = running.finish()
    assert (done.status, done.out) == (0, f"{place.runs / 'a'}\n")
    lines = running.plain.splitlines()
    assert lines[0].startswith("a: 1 CPU worker (this process), global batch 10 = 1 x 10, 8 steps")
    assert "step 4/8  epoch 1.00  loss 3.4254  val/loss 3.8872" in lines, "the bar shows the rest"
    assert any("100%" in line for line in lines)
    assert lines[-1] == "View it in TensorBoard with: launch board"
    assert running.shown.rstrip().count("\x1b[?25l") == running.shown.count("\x1b[?25h"), "the cursor is shown again"
