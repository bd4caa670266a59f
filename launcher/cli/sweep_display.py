"""Shows the progress of a sweep on standard error: a live table on a terminal, otherwise one line per trial."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.cli.streams import QuietStream, log_failure
from launcher.cli.terminal import PHASES, stop_or_detach
from launcher.config.overrides import masked
from launcher.formatting import detached, duration, number
from launcher.money import BUDGET, larger_budget
from launcher.runs import RunDirectory
from launcher.sweeps.observer import Headline, SweepObserver, SweepOutcome
from launcher.sweeps.space import plain_text
from launcher.terminal_text import printable

_FIXED = 4  # columns before the swept keys
_GAP = 2  # between columns
_ROWS = 12  # of the table: the running trials, and the newest that have ended
_STYLES = {"completed": "green", "failed": "red", "pruned": "yellow", "running": "cyan"}


class SweepDisplay(SweepObserver):
    """Shows the events of a sweep.

    Attributes:
        directory: the directory of the sweep, once it is known.
        finished: whether all trials had ended before, so that there is nothing to do.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = QuietStream(stream or sys.stderr)
        self.stream.on_failure = self._log_failure
        self._console = Console(file=cast(Any, self.stream), highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._table: list[dict[str, Any]] = []
        self._facts: Mapping[str, Any] = {}
        self._progress: dict[int, Mapping[str, Any]] = {}
        self._keys: list[str] = []
        self._drawn = 0.0
        self._estimated = False
        self._phase = "starting"
        self._total = 0
        self.directory: RunDirectory | None = None
        self.finished = False

    def __enter__(self) -> SweepDisplay:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # ---- the observer -----------------------------------------------------------------------------------------------

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "phase":
            self._phase = PHASES.get(event["name"], event["name"])
            self._draw()
        elif event["kind"] in ("line", "note"):
            self.say(event["text"])

    def sent(self, directory: RunDirectory, where: str) -> None:
        self.directory = directory
        self.say(f"{directory.name}: sent to {where}")

    def asked_to_end(self) -> str:
        return stop_or_detach(self._console, "sweep", self._live)

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        self.directory, self.finished = directory, headline.finished
        self._keys, self._total = headline.keys, headline.total
        if headline.finished:
            ended = f"all of its {headline.total} trials have ended"
            self.say(f"{directory.name} is finished: {ended}. There is nothing to do.")
        else:
            self.say(f"{directory.name}: {headline.text}")

    def trial(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "progress":
            self._progress[number] = event
            self._draw()
        elif event["kind"] == "line":
            self._console.print(Text.from_ansi(printable(f"[trial {number}] {event['text']}", colours=True)))
        elif event["kind"] == "note":
            self.say(f"trial {number}: {event['text']}")

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        self._table, self._facts = table, facts
        if facts["seconds_left"] and not self._estimated and self._live is None:
            self._estimated = True
            self.say(f"about {duration(facts['seconds_left'])} left")
        self._draw(now=True)

    def say(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def _log_failure(self, reason: str) -> None:
        if self.directory is not None and self.directory.exists():
            log_failure(self.directory.log, reason)

    # ---- the table --------------------------------------------------------------------------------------------------

    def _draw(self, now: bool = False) -> None:
        if self._live is None or not (now or time.monotonic() - self._drawn > 0.25):
            return
        self._drawn = time.monotonic()
        self._live.update(self.picture(), refresh=True)

    def picture(self) -> RenderableType:
        """Return the table of trials with the summary below it."""
        if not self._table:
            return Text(self._phase)
        headings = ["trial", "state", "step", "objective", *map(printable, self._keys)]
        rows = [self._cells(row) for row in self._shown_rows()]
        table = Table(box=None, pad_edge=False)
        fitting = self._fitting([headings, *rows])
        for heading in headings[:fitting]:
            table.add_column(Text(heading), no_wrap=True)
        for cells in rows:
            styles = ("", _STYLES.get(cells[1], ""))
            table.add_row(
                *(Text(cell, style=style) for cell, style in zip_longest(cells[:fitting], styles, fillvalue=""))
            )
        return Group(table, Text(self.summary()))

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        best = " *" if row["number"] == self._facts.get("best") else ""
        begin = [f"{row['number']}{best}", printable(row["state"]), self._step(row), _objective(row["objective"])]
        return [*begin, *(printable(_short(row.get(key))) for key in self._keys)]

    def _fitting(self, lines: Sequence[Sequence[str]]) -> int:
        """Return the number of columns that fit the terminal. A narrow one omits swept keys rather than cut numbers."""
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        ends = accumulate(width + _GAP for width in widths)
        return max(_FIXED, sum(end - _GAP <= self._console.width for end in ends))

    def _shown_rows(self) -> list[dict[str, Any]]:
        running = [row for row in self._table if row["state"] == "running"]
        best = [row for row in self._table if row["number"] == self._facts.get("best")]
        ended = [row for row in self._table if row["state"] not in ("running", "waiting") and row not in best]
        chosen = [*best, *ended[-max(0, _ROWS - len(running) - len(best)) :], *running]
        return sorted(chosen, key=lambda row: row["number"])

    def _step(self, row: Mapping[str, Any]) -> str:
        event = self._progress.get(row["number"])
        return f"{event['step']}/{event['total_steps']}" if event else ""

    def summary(self) -> str:
        """Return `3 running, 8 completed, 1 pruned, 15 left; best …; about 3m left`."""
        counts: dict[str, int] = {}
        for row in self._table:
            counts[row["state"]] = counts.get(row["state"], 0) + 1
        total = self._total or len(self._table)
        counts["waiting"] = total - sum(count for state, count in counts.items() if state != "waiting")
        order = ("running", "completed", "pruned", "failed", "stopped", "waiting")
        parts = [", ".join(f"{counts[state]} {state}" for state in order if counts.get(state))]
        if self._facts.get("best") is not None:
            row = next(row for row in self._table if row["number"] == self._facts["best"])
            parts.append(f"best: trial {row['number']}, {_objective(row['objective'])}")
        left = self._facts.get("seconds_left")
        parts.append(f"about {duration(left)} left" if left else f"{self._phase}…" if not self._progress else "")
        return "; ".join(part for part in parts if part)


def conclusion(outcome: SweepOutcome) -> list[str]:
    """Return the last lines about a sweep: its status, its best trial, and the command to continue with."""
    result, name = outcome.result, outcome.directory.name
    if outcome.detached:
        return [detached(name)]
    counts = {state: count for state, count in result["trials"].items() if state != "total"}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [
        f"{result['status']} in {duration(result['seconds'] or 0)}: {summary} of {result['trials']['total']} trials"
    ]
    if outcome.best is not None:
        words = " ".join(masked(word) for word in outcome.best["overrides"])
        objective = _objective(outcome.best["objective"])
        if "mean" in outcome.best:
            spread = "" if outcome.best["spread"] is None else f" ± {number(outcome.best['spread'])}"
            objective += f" (mean {number(outcome.best['mean'])}{spread} of {outcome.best['repeats']})"
        lines.append(f"best: trial {outcome.best['number']}, {objective}  {words}")
    root = "" if outcome.root == "runs" else f" run.root={outcome.root}"
    if result["status"] == "stopped":
        spent = result.get("reason") == BUDGET
        more = f" {larger_budget(result['cost_usd'])}" if spent else ""
        lines.append(
            f"{'The budget is spent. ' * spent}Continue it with: launch -m run.name={name}{root} run.resume=true{more}"
        )
    elif outcome.best is not None:
        lines.append(f"Train the best further with: launch run.like={name}/best{root}")
    if result["status"] == "completed" and counts.get("failed") and outcome.exit_rule != "any_failed":
        lines.append("The exit status is 0 although trials failed. Use sweep.exit=any_failed for exit status 1.")
    return lines


def _objective(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(number(each) for each in value)
    return "" if value is None else number(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else plain_text(value)
