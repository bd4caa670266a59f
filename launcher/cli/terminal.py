"""Shows the progress of a run on standard error: a progress bar on a terminal, otherwise one line per log interval."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from launcher.cli.streams import QuietStream
from launcher.formatting import evaluation, facts, step_line
from launcher.terminal_text import printable

PHASES = {
    "check": "checking data and model",
    "cluster": "contacting the cluster",
    "ray": "starting Ray",
    "workers": "starting workers",
    "data": "reading data",
    "model": "building the model",
    "training": "training",
}


def stop_or_detach(console: Console, what: str, live: Progress | Live | None) -> str:
    """Ask after Ctrl-C whether to stop a remote run or to detach from it. Return "stop" or "detach".

    Without a terminal the answer is "stop".

    Args:
        what: "run" or "sweep".
        live: the picture on the terminal, which is paused during the question.
    """
    if not (sys.stdin is not None and sys.stdin.isatty() and console.file.isatty()):
        return "stop"
    if live is not None:
        live.stop()
    question = f"Ctrl-C: stop the {what} (after a checkpoint), or detach and let it continue? [s/d] "
    console.print(Text(question), end="")
    answer = sys.stdin.readline()
    if live is not None:
        live.start()
    return "detach" if answer.strip().lower().startswith("d") else "stop"


class Display:
    """Shows the events of a run; `engine.control.Control.emit` lists their kinds.

    Args:
        workers: the number of workers; with more than one, lines that the user's code prints have the rank in front.
        stream: where to print; standard error by default.

    Attributes:
        stream: the same, but never raises: a terminal or pipe that goes away does not end the run.
    """

    def __init__(self, workers: int = 1, stream: TextIO | None = None) -> None:
        self.workers = workers
        # Not as HTML in a notebook: rich would print it to the output of the cell instead of the stream.
        self.stream = QuietStream(stream or sys.stderr)
        self._console = Console(file=cast(Any, self.stream), highlight=False, soft_wrap=True, force_jupyter=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._prompt = False  # the user's code waits for input, and the bar must not overwrite its prompt

    def __enter__(self) -> Display:
        # Not `is_terminal`, which FORCE_COLOR sets for files as well.
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # output during a run arrives as events
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("starting", total=None, facts="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event of the run."""
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
        """Ask after Ctrl-C whether to stop a remote run or to detach from it."""
        return stop_or_detach(self._console, "run", self._bar)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(Text(printable(text)))

    def _line(self, event: Mapping[str, Any]) -> None:
        mark = f"[rank {event['rank']}] " if self.workers > 1 else ""
        whole = event.get("whole", True)
        if not whole and self._bar is not None:
            self._bar.stop()
            self._prompt = True
        # A part of a line is a prompt (input, pdb), which must appear immediately and without a line break.
        self._console.print(Text.from_ansi(printable(mark + event["text"], colours=True)), end="\n" if whole else "")

    def _progress(self, event: Mapping[str, Any]) -> None:
        if self._bar is not None and self._prompt:
            self._bar.start()
            self._prompt = False
        self._update(description="training", completed=event["step"], total=event["total_steps"], facts=facts(event))
        if event["values"] and (self._bar is None or evaluation(event["values"])):
            self.say(step_line(event, brief=self._bar is not None))  # the bar shows the rest

    def _update(self, **changes: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, **changes)
