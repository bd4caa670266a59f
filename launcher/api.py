"""The implementation of the Python API in `launcher/__init__.py`, which imports this module on use."""

from __future__ import annotations

import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from launcher.cli import display, sweep_display
from launcher.cli.notebook import NotebookDisplay, in_notebook
from launcher.cli.terminal import Display
from launcher.errors import Stopped
from launcher.jobs import training
from launcher.jobs.prepare import Request
from launcher.runs.curves import Result
from launcher.sweeps import api as sweeps
from launcher.sweeps.observer import SweepObserver


def launch(*words: str, config_dir: str | PathLike[str] | None = None, quiet: bool = False) -> Result:
    """Implement `launcher.launch`, which documents the arguments, the result and the errors."""
    note = _ignore if quiet else _note
    request = Request(words, _directory(config_dir), note=note)
    try:
        if quiet:
            outcome = training.train(request, training.Observer())
            return Result(outcome.result, outcome.directory)
        with NotebookDisplay() if in_notebook() else Display() as screen:
            run_display = display.RunDisplay(screen)
            outcome = training.train(request, run_display)
            if not run_display.finished:
                for text in display.conclusion(outcome, interactive=False):
                    screen.say(text)
            return Result(outcome.result, outcome.directory)
    except Stopped:
        raise KeyboardInterrupt from None


def sweep(
    *words: str, trials: int | None = None, config_dir: str | PathLike[str] | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Implement `launcher.sweep`, which documents the arguments, the result and the errors."""
    request = sweeps.as_request(words, trials, _directory(config_dir), _ignore if quiet else _note)
    try:
        if quiet:
            outcome = sweeps.run(request, SweepObserver())
        else:
            with sweep_display.SweepDisplay() as screen:
                outcome = sweeps.run(request, screen)
                for text in [] if screen.finished else sweep_display.conclusion(outcome):
                    screen.say(text)
    except Stopped:
        raise KeyboardInterrupt from None
    return {
        "trials": outcome.trials,
        "best": outcome.best,
        "result": outcome.result,
        "directory": str(outcome.directory.path),
    }


def _directory(given: str | PathLike[str] | None) -> Path | None:
    """Return the configuration directory: the argument, else the environment variable LAUNCH_CONFIG_DIR."""
    chosen = given or os.environ.get("LAUNCH_CONFIG_DIR")
    return Path(chosen).expanduser().absolute() if chosen else None


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _ignore(text: str) -> None:
    pass
