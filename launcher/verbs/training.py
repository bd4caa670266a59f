"""Train: one run, or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.errors import LaunchError, Stopped
from launcher.verbs import kubernetes
from launcher.verbs.output import results_alone, say, tell

if TYPE_CHECKING:
    from launcher.jobs.training import Outcome
    from launcher.runs import RunDirectory
    from launcher.verbs.line import Line


def train(line: Line) -> int:
    if "multirun" in line.flags and not kubernetes.is_meant(line):
        return _sweep(line)
    from launcher import show
    from launcher.jobs import ranks, training
    from launcher.terminal import Display

    with results_alone() as result:
        if kubernetes.is_meant(line):
            return kubernetes.train(line, result)
        if not ranks.speaks():
            return _status(training.train(line.request(), training.Observer()))
        with Display() as display:
            shown = show.Shown(display)
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
            for text in show.conclusion(outcome, sys.stderr.isatty()):
                say(text)
        result(outcome.directory.told())
        return _status(outcome)


def _conclude_failure(
    error: LaunchError | Stopped, directory: RunDirectory, result: Callable[[str], None], verbose: bool
) -> int:
    """Tell how a run ended that had started, and where it lies."""
    from launcher import show
    from launcher.jobs import training

    if isinstance(error, Stopped):
        status = training.exit_status_of(error.signal_number)
        say("stopped at once" if directory.result().get("steps") else "stopped before the first step")
    else:
        status = tell(error, verbose)
    for text in show.after_failure(directory, error):
        say(text)
    result(directory.told())
    return status


def _status(outcome: Outcome) -> int:
    from launcher.jobs.training import exit_status_of

    stopped = outcome.result.get("status", "stopped") == "stopped" and outcome.signal_number is not None
    return exit_status_of(outcome.signal_number) if stopped else 0


def _sweep(line: Line) -> int:
    from launcher import sweeps
    from launcher.sweeps.show import SweepDisplay, conclusion

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
