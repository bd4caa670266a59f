"""`launch runs`, `logs` and `stop`: what a run root tells without training anything."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import RunError
from launcher.runs import FINAL, SENT, RunDirectory, list_runs
from launcher.runs.mirror import Mirrored, following
from launcher.runs.plain_files import open_file, problem_at
from launcher.terminal_text import printable

UNREADABLE = "unreadable"
_STOP_SECONDS = 600.0


def rows(root: Path) -> list[dict[str, Any]]:
    """Return one mapping a run under `root`, oldest first. The states of runs that were sent are asked for."""
    found: list[dict[str, Any]] = []
    silent = []
    for run in list_runs(root):
        result: dict[str, Any] = {}
        why = ""
        try:
            why = problem_at(run.path, deep=False) or ""
            result, status = ({}, UNREADABLE) if why else (run.result(), run.status())
        except (RunError, OSError) as error:  # one damaged file must not hide the other runs
            why = str(error) if isinstance(error, RunError) else f"{run.path} cannot be read: {error.strerror}."
            status = UNREADABLE
        if status == SENT:
            silent.append((run, len(found)))
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
                "directory": run.told(),
            }
        )
    if silent:
        from launcher.jobs.remote.states import states_of  # with ssh and Ray's client

        states = states_of([run for run, _ in silent])
        for run, number in silent:
            if run.path in states:
                state = states[run.path]
                found[number].update(status=state.word, error=found[number]["error"] or state.reason or None)
    return found


def table(found: list[dict[str, Any]], root: Path) -> None:
    """Print the runs for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from launcher.formatting import duration

    if not found:
        print(f"No runs in {RunDirectory(root / 'run').root}.", file=sys.stderr)
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
        )
        # As `Text`: a plain one would be read as rich's markup.
        grid.add_row(*(Text(printable(cell).replace("\n", "\\n")) for cell in cells))
    # Not on a terminal: as wide as it needs, so that nothing is cut off in a pipe.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=400)
    console.print(grid)
    for row in found:
        if row["status"] in (UNREADABLE, "lost", "unreachable") and row["error"]:
            print(printable(f"{row['name']}: {row['error']}"), file=sys.stderr)


def strict_json(value: Any) -> Any:
    """Return rows as JSON knows them: a loss that is not finite becomes null."""
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
    still: Callable[[], bool] = lambda: False,
    bring: Callable[[], None] = lambda: None,
) -> None:
    """Print log.txt and, while the run goes on, what is added to it.

    Args:
        still: of a run that was sent and whose files are old: whether its cluster works on it.
        bring: copies the files of a run that was sent; its result may be newer here than its log.
    """
    refresh = following(run)
    refresh()
    if not run.log.exists() and run.status() != "running":
        raise RunError(f'The run "{run.name}" has printed nothing: there is no {run.log}.')
    while not run.log.exists():
        time.sleep(0.2)
        refresh()
    place = 0
    while True:
        refresh()
        status = run.status()
        # Asked before reading: what is written last is still read.
        going_on = until_the_end and (status == "running" or (status == SENT and still()))
        if until_the_end and not going_on:
            bring()
        with open_file(run.log, errors="replace") as log:  # the copy of one on a store is replaced as a whole
            log.seek(place)
            sys.stdout.write(printable(log.read()))
            place = log.tell()
        sys.stdout.flush()
        if not going_on:
            return
        time.sleep(0.3)


def stop(run: RunDirectory) -> str:
    """Have a run save a checkpoint and stop, and wait for it. Returns what came of it.

    Raises:
        RunError: it does not run, or did not stop in ten minutes.
    """
    refresh = following(run)
    refresh()
    status = run.status()
    if status == "lost":
        raise RunError(
            f'The run "{run.name}" says that it is running, but nothing works on it any more. '
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
        f'The run "{run.name}" did not stop within {_STOP_SECONDS:.0f} s; it may be in a long step. The request stays; '
        f"see: launch logs {run.name}."
    )
