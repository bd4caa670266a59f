"""Distributed PyTorch training from a Hydra configuration.

>>> from launcher import launch
>>> result = launch("experiment=mnist", "trainer.epochs=1")
>>> result["metrics"]["val/accuracy"]
"""

from __future__ import annotations

import sys

# `python -m launcher` has put the current directory before all others on the path: its modules shadow none of ours
# (`launcher.config.calling_directory` puts it where it belongs). Before any other import.
_as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "launcher"
if _as_module and not sys.flags.safe_path and sys.path[0] != __path__[0].rpartition("/")[0]:
    del sys.path[0]

from os import PathLike  # noqa: E402
from typing import Any  # noqa: E402

__all__ = ["launch", "sweep"]

# Where Hydra finds `hydra_plugins.launch_sweeper`; a package of that name may not have an `__init__.py` of anybody's.
sys.path.append(f"{__path__[0]}/plugins")


def launch(*words: str, config_dir: str | PathLike[str] | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run one training job as `launch WORDS…` does on the command line, and return what its `result.json` holds.

    A Ray that is initialised in this process is used and left running; otherwise one is started for the job. Ctrl-C
    once saves a checkpoint and returns, with `status` "stopped".

    Args:
        words: Hydra overrides, such as "experiment=mnist" and "trainer.epochs=1".
        config_dir: a directory of your own configuration; default: the environment variable LAUNCH_CONFIG_DIR.
        quiet: print nothing. Otherwise progress goes to standard error.

    Raises:
        launcher.errors.RequestError: what was asked is wrong or cannot be met; nothing was started.
        launcher.errors.TrainingError: it started and failed; `UserCodeError.traceback_text` is your code's traceback.
        KeyboardInterrupt: a second Ctrl-C, or one before training began.
    """
    import os
    from pathlib import Path

    from launcher.errors import Stopped
    from launcher.jobs import training

    chosen = config_dir or os.environ.get("LAUNCH_CONFIG_DIR")
    note = _ignore if quiet else _note
    request = training.Request(words, Path(chosen).expanduser().absolute() if chosen else None, note=note)
    try:
        if quiet:
            return training.train(request, training.Observer()).result
        from launcher.cli.display import Shown, conclusion
        from launcher.cli.terminal import Display

        with Display() as display:
            shown = Shown(display)
            outcome = training.train(request, shown)
            if not shown.finished:
                for text in conclusion(outcome, interactive=False):
                    display.say(text)
            return outcome.result
    except Stopped:
        raise KeyboardInterrupt from None


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _ignore(text: str) -> None:
    pass


def sweep(
    *words: str, trials: int | None = None, config_dir: str | PathLike[str] | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Run a sweep as `launch -m WORDS…` does on the command line.

        found = sweep("model=mlp", "optimizer.lr=tag(log,interval(1e-4,1e-1))", trials=20)
        found["best"]["overrides"]          # ["optimizer.lr=0.0021"]

    Args:
        words: Hydra overrides, in Hydra's sweep syntax.
        trials: how many trials a search has (`sweep.trials`); a grid needs none.
        config_dir, quiet: as for `launch`.

    Returns:
        `trials`: one mapping a trial, with the columns of trials.csv; `best`: number, objective, overrides and
        parameters of the best, or None; `result`: what the sweep's result.json holds; `directory`: where all of it is.

    Raises:
        launcher.errors.RequestError: what was asked is wrong or cannot be met; nothing was started.
        KeyboardInterrupt: a second Ctrl-C, or one before the first trial began.
    """
    import os
    from pathlib import Path

    from launcher.cli.sweep_display import SweepDisplay, conclusion
    from launcher.errors import Stopped
    from launcher.sweeps import api as sweeps
    from launcher.sweeps.observer import SweepObserver

    chosen = config_dir or os.environ.get("LAUNCH_CONFIG_DIR")
    place = Path(chosen).expanduser().absolute() if chosen else None
    request = sweeps.as_request(words, trials, place, _ignore if quiet else _note)
    try:
        if quiet:
            outcome = sweeps.run(request, SweepObserver())
        else:
            with SweepDisplay() as display:
                outcome = sweeps.run(request, display)
                for text in [] if display.finished else conclusion(outcome):
                    display.say(text)
    except Stopped:
        raise KeyboardInterrupt from None
    return {
        "trials": outcome.trials,
        "best": outcome.best,
        "result": outcome.result,
        "directory": str(outcome.directory.path),
    }
