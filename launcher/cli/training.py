"""Train: one run, or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.cli import batch
from launcher.cli.output import results_alone, say, tell
from launcher.errors import LaunchError, Stopped

if TYPE_CHECKING:
    from launcher.cli.line import Line
    from launcher.jobs.training import Outcome
    from launcher.runs import RunDirectory


def train(line: Line) -> int:
    if "multirun" in line.flags and not batch.is_meant(line):
        return _sweep(line)
    from launcher.cli import display
    from launcher.cli.terminal import Display
    from launcher.jobs import ranks, training

    with results_alone() as result:
        if batch.is_meant(line):
            return batch.train(line, result)
        if not ranks.prints():
            return _status(training.train(line.request(), training.Observer()))
        with Display() as screen:
            shown = display.Shown(screen)
            outcome: Outcome | LaunchError | Stopped
            try:
                outcome = training.train(line.request(), shown)
            except (LaunchError, Stopped) as error:
                if shown.directory is None or not shown.directory.exists():
                    raise  # before the start: nothing is there to be named
                outcome = error
        if isinstance(outcome, (LaunchError, Stopped)):
            assert shown.directory is not None
            return _conclude_failure(outcome, shown.directory, result, line.verbose)
        if not shown.finished:
            for text in display.conclusion(outcome, sys.stderr.isatty()):
                say(text)
        result(outcome.directory.told())
        return _status(outcome)


def _conclude_failure(
    error: LaunchError | Stopped, directory: RunDirectory, result: Callable[[str], None], verbose: bool
) -> int:
    """Tell how a run ended that had started, and where it lies."""
    from launcher.cli import display
    from launcher.jobs import training

    if isinstance(error, Stopped):
        status = training.exit_status_of(error.signal_number)
        say("stopped at once" if directory.result().get("steps") else "stopped before the first step")
    else:
        status = tell(error, verbose)
    for text in display.after_failure(directory, error):
        say(text)
    result(directory.told())
    return status


def _status(outcome: Outcome) -> int:
    from launcher.jobs.training import exit_status_of

    stopped = outcome.result.get("status", "stopped") == "stopped" and outcome.signal_number is not None
    return exit_status_of(outcome.signal_number) if stopped else 0


def _sweep(line: Line) -> int:
    from launcher.cli.sweep_display import SweepDisplay, conclusion
    from launcher.sweeps import api as sweeps

    with results_alone() as result:
        with SweepDisplay() as display:
            try:
                outcome = sweeps.run(line.request(), display)
            except Stopped:
                if display.directory is not None and display.directory.exists():
                    result(str(display.directory.path))
                raise
        if not display.finished:
            for text in conclusion(outcome):
                say(text)
        result(str(outcome.directory.path))
        return sweeps.exit_status(outcome)
