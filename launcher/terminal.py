"""What the user sees while a run goes on: a progress bar on a terminal, a line per log interval elsewhere.

Everything goes to standard error; standard output carries results alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

_PHASES = {
    "ray": "starting Ray",
    "workers": "starting workers",
    "data": "reading data",
    "model": "building the model",
    "training": "training",
}


class Display:
    """Shows the events of a run; see `engine.control.Control.emit` for their kinds.

    Args:
        workers: when more than one, lines that the user's code prints are marked with the rank.
    """

    def __init__(self, workers: int = 1, stream: TextIO | None = None) -> None:
        self.workers = workers
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._logged_step = -1

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, facts="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "progress":
            self._progress(event)
        elif kind == "line":
            self._line(event)
        elif kind == "note":
            self.say(str(event["text"]))
        elif kind == "phase" and self._bar is not None:
            self._bar.update(self._task, description=_PHASES.get(event["name"], event["name"]))

    def say(self, text: str) -> None:
        """Print one line of our own."""
        self._console.print(Text(text))

    def _line(self, event: Mapping[str, Any]) -> None:
        mark = f"[rank {event['rank']}] " if self.workers > 1 else ""
        # A part of a line is a prompt (input, pdb): it must appear as it is, and at once.
        self._console.print(Text(mark + event["text"]), end="\n" if event.get("whole", True) else "")

    def _progress(self, event: Mapping[str, Any]) -> None:
        facts = describe(event)
        if self._bar is not None:
            self._bar.update(
                self._task, description="training", completed=event["step"], total=event["total_steps"], facts=facts
            )
        if event["values"] and (self._bar is None or any(tag.startswith("val/") for tag in event["values"])):
            self.say(f"step {event['step']}/{event['total_steps']}  {facts}{_validation(event['values'])}")


def describe(event: Mapping[str, Any]) -> str:
    """Return the facts of a progress event in one line."""
    parts = [f"epoch {event['epoch']:.2f}"]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event.get("samples_per_second"):
        parts.append(f"{event['samples_per_second']:,.0f} samples/s")
    if event.get("seconds_left") is not None:
        parts.append(f"{duration(event['seconds_left'])} left")
    return "  ".join(parts)


def _validation(values: Mapping[str, float]) -> str:
    found = [f"{tag} {value:.4f}" for tag, value in values.items() if tag.startswith("val/")]
    return "  " + "  ".join(found) if found else ""


def duration(seconds: float) -> str:
    """Return seconds as `12s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
