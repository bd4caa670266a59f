"""`launch train`: one run, a sweep, or a job for a scheduler."""

from __future__ import annotations

import sys
from collections.abc import Callable

from launcher.cli import batch, display
from launcher.cli.line import Line
from launcher.cli.open_port import confirmed
from launcher.cli.output import report, results_only, say
from launcher.cli.requests import request_of
from launcher.cli.streams import ignore_hangup
from launcher.cli.terminal import Display
from launcher.errors import LaunchError, Stopped
from launcher.jobs import ranks, training
from launcher.jobs.training import Outcome, exit_status_of
from launcher.runs import RunDirectory


def train(line: Line) -> int:
    """Run `launch train`."""
    line.words = confirmed(line.words)
    with ignore_hangup(), results_only(is_required=False) as result:
        if batch.uses_scheduler(line):
            return batch.train(line, result)
        if "multirun" in line.flags:
            from launcher.cli import sweeping  # imports Optuna

            return sweeping.train(line, result)
        if not ranks.prints():
            return _status(training.train(request_of(line), training.Observer()))
        with Display() as screen:
            run_display = display.RunDisplay(screen)
            outcome: Outcome | LaunchError | Stopped
            try:
                outcome = training.train(request_of(line), run_display)
            except (LaunchError, Stopped) as error:
                if run_display.directory is None or not run_display.directory.exists():
                    raise  # before the start: there is no run directory to print
                outcome = error
        if isinstance(outcome, (LaunchError, Stopped)):
            assert run_display.directory is not None
            return _conclude_failure(outcome, run_display.directory, result, line.verbose)
        if not run_display.finished:
            for text in display.conclusion(outcome, sys.stderr.isatty()):
                say(text)
        result(outcome.directory.display_path())
        return _status(outcome)


def _conclude_failure(
    error: LaunchError | Stopped, directory: RunDirectory, result: Callable[[str], None], verbose: bool
) -> int:
    """Print why a run that had started has ended, how to continue it, and its directory. Return the exit status."""
    if isinstance(error, Stopped):
        status = exit_status_of(error.signal_number)
        say("stopped at once" if directory.result().get("steps") else "stopped before the first step")
    else:
        status = report(error, verbose)
    for text in display.after_failure(directory, error):
        say(text)
    result(directory.display_path())
    return status


def _status(outcome: Outcome) -> int:
    stopped = outcome.result.get("status", "stopped") == "stopped" and outcome.signal_number is not None
    return exit_status_of(outcome.signal_number) if stopped else 0
