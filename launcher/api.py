"""The Python API: `launch` runs one job, `sweep` runs a sweep. Exported by the package `launcher`."""

from __future__ import annotations

import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from launcher.cli import display, sweep_display
from launcher.cli.terminal import Display
from launcher.errors import Stopped
from launcher.jobs import training
from launcher.jobs.prepare import Request
from launcher.sweeps import api as sweeps
from launcher.sweeps.observer import SweepObserver


def launch(*words: str, config_dir: str | PathLike[str] | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run one training job as `launch WORDS…` does on the command line, and return the content of its `result.json`.

    If Ray is initialized in this process, the job uses it and leaves it running; otherwise Ray is started for the job.
    The first Ctrl-C saves a checkpoint and returns, with `status` "stopped".

    Args:
        words: Hydra overrides, such as "experiment=mnist" and "trainer.epochs=1".
        config_dir: a directory with your own configuration; by default the environment variable LAUNCH_CONFIG_DIR.
        quiet: print nothing. Otherwise progress goes to standard error.

    Raises:
        launcher.errors.RequestError: the request is invalid or cannot be met; nothing was started.
        launcher.errors.TrainingError: the job failed after its start; `UserCodeError.traceback_text` contains the
            traceback of your code.
        KeyboardInterrupt: Ctrl-C was pressed twice, or before training began.
    """
    note = _ignore if quiet else _note
    request = Request(words, _directory(config_dir), note=note)
    try:
        if quiet:
            return training.train(request, training.Observer()).result
        with Display() as screen:
            run_display = display.RunDisplay(screen)
            outcome = training.train(request, run_display)
            if not run_display.finished:
                for text in display.conclusion(outcome, interactive=False):
                    screen.say(text)
            return outcome.result
    except Stopped:
        raise KeyboardInterrupt from None


def sweep(
    *words: str, trials: int | None = None, config_dir: str | PathLike[str] | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Run a sweep as `launch -m WORDS…` does on the command line.

        found = sweep("model=mlp", "optimizer.lr=tag(log,interval(1e-4,1e-1))", trials=20)
        found["best"]["overrides"]          # ["optimizer.lr=0.0021"]

    Args:
        words: Hydra overrides, in Hydra's sweep syntax.
        trials: the number of trials of a search (`sweep.trials`); not needed for a grid.
        config_dir, quiet: as for `launch`.

    Returns:
        `trials`: one mapping for each trial, with the columns of trials.csv; `best`: number, objective, overrides and
        parameters of the best trial, or None; `result`: the content of the sweep's result.json; `directory`: the
        directory of the sweep.

    Raises:
        launcher.errors.RequestError: the request is invalid or cannot be met; nothing was started.
        KeyboardInterrupt: Ctrl-C was pressed twice, or before the first trial began.
    """
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
