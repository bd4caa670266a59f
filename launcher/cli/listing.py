"""Lists the runs of a run root, follows a log, and stops a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from launcher.cli.tables import ResultConsole
from launcher.errors import RunError
from launcher.formatting import duration
from launcher.jobs.remote.states import states_of
from launcher.runs import FINAL, SENT, RunDirectory, list_runs
from launcher.runs.mirror import Mirrored, following
from launcher.runs.plain_files import open_file, problem_at
from launcher.terminal_text import printable

UNREADABLE = "unreadable"
_STOP_SECONDS = 600.0


def rows(root: Path) -> list[dict[str, Any]]:
    """Return one mapping for each run under `root`, oldest first. The states of remote runs are fetched."""
    found: list[dict[str, Any]] = []
    remote = []
    for run in list_runs(root):
        result: dict[str, Any] = {}
        why = ""
        try:
            why = problem_at(run.path, deep=False) or ""
            result, status = ({}, UNREADABLE) if why else (run.result(), run.status())
        except (RunError, OSError) as error:  # a damaged run must not hide the others
            why = str(error) if isinstance(error, RunError) else f"{run.path} cannot be read: {error.strerror}."
            status = UNREADABLE
        if status == SENT:
            remote.append((run, len(found)))
        metrics = result.get("metrics") or {}
        found.append(
            {
                "name": run.name,
                "status": status,
                "reason": result.get("reason"),
                "steps": result.get("steps"),
                "loss": metrics.get("train/loss"),
                "best": result.get("best"),
                "workers": result.get("workers"),
                "seconds": result.get("seconds"),
                "cost_usd": result.get("cost_usd"),
                "error": why or result.get("error"),
                "directory": run.display_path(),
            }
        )
    if remote:
        states = states_of([run for run, _ in remote])
        for run, number in remote:
            if run.path in states:
                state = states[run.path]
                found[number].update(status=state.word, error=found[number]["error"] or state.reason or None)
    return found


def print_table(found: list[dict[str, Any]], root: Path, columns: Sequence[str] = ()) -> None:
    """Print the rows of `rows` as a table, and the errors of runs without a result below it."""
    if not found:
        what = "No matching runs" if any(list_runs(root)) else "No runs"
        print(f"{what} in {RunDirectory(root / 'run').root}.", file=sys.stderr)
        return
    grid = Table(box=None, pad_edge=False)
    for heading, justify in (
        ("run", "left"),
        ("state", "left"),
        ("step", "right"),
        ("train/loss", "right"),
        ("best", "left"),
        ("workers", "right"),
        ("time", "right"),
        ("USD", "right"),
        *((column, "right") for column in columns),
    ):
        grid.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in found:
        best = row["best"]
        cells = (
            row["name"],
            row["status"],
            _text(row["steps"]),
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            f"{best['tag']} {best['value']:.4f} at {best['step']}" if best else "",
            _text(row["workers"]),
            duration(row["seconds"]) if row["seconds"] else "",
            "" if row["cost_usd"] is None else f"{row['cost_usd']:.2f}",
            *(_text(row["columns"][column]) for column in columns),
        )
        # As `Text`, because rich interprets markup in plain strings.
        grid.add_row(*(Text(printable(cell).replace("\n", "\\n")) for cell in cells))
    # Wide enough that no cell is truncated in a pipe.
    console = ResultConsole(highlight=False) if sys.stdout.isatty() else ResultConsole(highlight=False, width=400)
    console.print(grid)
    for row in found:
        if row["status"] in (UNREADABLE, "lost", "unreachable") and row["error"]:
            print(printable(f"{row['name']}: {row['error']}"), file=sys.stderr)


def strict_json(value: Any) -> Any:
    """Return plain data as valid JSON: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def follow(
    run: RunDirectory,
    until_the_end: bool = True,
    is_active: Callable[[], bool] = lambda: False,
    fetch: Callable[[], None] = lambda: None,
) -> None:
    """Print log.txt and, while the run is active, the lines that are added to it.

    Args:
        until_the_end: follow the log until the run ends; otherwise print its present content only.
        is_active: whether the cluster of a remote run is still working on it.
        fetch: copies the files of a remote run; the local log may be older than the local result.

    Raises:
        RunError: the run has ended without a log.
    """
    refresh = following(run)
    refresh()
    if not run.log.exists() and run.status() != "running":
        raise RunError(f'The run "{run.name}" has no log: {run.log} does not exist.')
    while not run.log.exists():
        time.sleep(0.2)
        refresh()
    position = 0
    while True:
        refresh()
        status = run.status()
        # Checked before reading, so that the last lines are read as well.
        active = until_the_end and (status == "running" or (status == SENT and is_active()))
        if until_the_end and not active:
            fetch()
        with open_file(run.log, errors="replace") as log:  # opened each time: the copy of a log on a store is replaced
            log.seek(position)
            sys.stdout.write(printable(log.read()))
            position = log.tell()
        sys.stdout.flush()
        if not active:
            return
        time.sleep(0.3)


def stop(run: RunDirectory) -> str:
    """Request that a run saves a checkpoint and stops, wait for it, and return a line about its status.

    Raises:
        RunError: the run is not running, or did not stop within ten minutes.
    """
    refresh = following(run)
    refresh()
    status = run.status()
    if status == "lost":
        raise RunError(
            f'The run "{run.name}" is lost: its status is running, but its process no longer exists. '
            f"Continue it with: launch run.name={run.name} run.resume=true."
        )
    if status != "running":
        raise RunError(f'The run "{run.name}" is not running: it is {status}.')
    mirrored = Mirrored.of(run)
    if mirrored is not None:
        mirrored.request_stop()
    run.request_stop()
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        refresh()
        status = run.status()
        if status in FINAL or status == "lost":
            return f"{run.name} is {status} at step {run.result().get('steps')}."
        time.sleep(0.2)
    raise RunError(
        f'The run "{run.name}" did not stop within {_STOP_SECONDS:.0f} s; a step may take long. The request remains; '
        f"follow the run with: launch logs {run.name}."
    )
