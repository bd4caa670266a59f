"""What the user sees while a run goes on: a progress bar on a terminal, a line per log interval elsewhere.

Everything goes to standard error; standard output carries results alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from launcher.formatting import evaluated, facts, step_line
from launcher.terminal_text import printable

PHASES = {
    "check": "looking at data and model",
    "cluster": "asking the cluster",
    "ray": "starting Ray",
    "workers": "starting workers",
    "data": "reading data",
    "model": "building the model",
    "training": "training",
}


def stop_or_detach(console: Console, what: str, live: Progress | Live | None) -> str:
    """Ask what becomes of a run or a sweep elsewhere after Ctrl-C: "stop", also without a terminal, or "detach".

    Args:
        live: what is drawn on the terminal, and pauses meanwhile.
    """
    if not (sys.stdin is not None and sys.stdin.isatty() and console.file.isatty()):
        return "stop"
    if live is not None:
        live.stop()
    question = f"Ctrl-C: stop the {what} (after a checkpoint), or detach and let it go on? [s/d] "
    console.print(Text(question), end="")
    answer = sys.stdin.readline()
    if live is not None:
        live.start()
    return "detach" if answer.strip().lower().startswith("d") else "stop"


class Display:
    """Shows the events of a run; see `engine.control.Control.emit` for their kinds.

    Args:
        workers: when more than one, lines that the user's code prints are marked with the rank.
    """

    def __init__(self, workers: int = 1, stream: TextIO | None = None) -> None:
        self.workers = workers
        # Never as a notebook's HTML: that would go to the cell's output instead of the stream.
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._prompt = False  # the user's code waits for an answer: nothing may be drawn over it

    def __enter__(self) -> Display:
        # FORCE_COLOR makes rich take a file for a terminal; a bar in a file is a mess.
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # what is printed during a run comes as an event
                redirect_stderr=False,
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
        elif kind == "phase":
            self._update(description=PHASES.get(event["name"], printable(str(event["name"]))))

    def stop_or_detach(self) -> str:
        """Ask what becomes of a run elsewhere after Ctrl-C."""
        return stop_or_detach(self._console, "run", self._bar)

    def say(self, text: str) -> None:
        """Print one line of our own."""
        self._console.print(Text(printable(text)))

    def _line(self, event: Mapping[str, Any]) -> None:
        mark = f"[rank {event['rank']}] " if self.workers > 1 else ""
        whole = event.get("whole", True)
        if not whole and self._bar is not None:
            self._bar.stop()
            self._prompt = True
        # A part of a line is a prompt (input, pdb): it must appear as it is, and at once.
        self._console.print(Text.from_ansi(printable(mark + event["text"], colours=True)), end="\n" if whole else "")

    def _progress(self, event: Mapping[str, Any]) -> None:
        if self._bar is not None and self._prompt:
            self._bar.start()
            self._prompt = False
        self._update(description="training", completed=event["step"], total=event["total_steps"], facts=facts(event))
        if event["values"] and (self._bar is None or evaluated(event["values"])):
            self.say(step_line(event, brief=self._bar is not None))  # the bar has the rest

    def _update(self, **changes: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, **changes)
