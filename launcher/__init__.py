"""Distributed PyTorch training from a Hydra configuration.

>>> from launcher import launch
>>> result = launch("experiment=mnist", "trainer.epochs=1")
>>> result["metrics"]["val/accuracy"]
"""

from __future__ import annotations

import sys

# `python -m launcher` puts the current directory first on the path. Remove it before any other import, so that its
# modules do not shadow ours; `launcher.config.calling_directory` adds it again in the right place.
_as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "launcher"
if _as_module and not sys.flags.safe_path and sys.path[0] != __path__[0].rpartition("/")[0]:
    del sys.path[0]

from os import PathLike  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from launcher.api import Result

__all__ = ["launch", "sweep"]

# Hydra finds `hydra_plugins.launch_sweeper` here. `hydra_plugins` is a namespace package, without `__init__.py`.
sys.path.append(f"{__path__[0]}/plugins")


def launch(*words: str, config_dir: str | PathLike[str] | None = None, quiet: bool = False) -> Result:
    """Run one training job as `launch WORDS…` does on the command line, and return the content of its `result.json`.

    If Ray is initialized in this process, the job uses it and leaves it running; otherwise Ray is started for the job.
    The first Ctrl-C, and an interrupted cell of a notebook, saves a checkpoint and returns, with `status` "stopped".
    `plot()` of the result draws the curves.

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
    from launcher import api  # imports Hydra

    return api.launch(*words, config_dir=config_dir, quiet=quiet)


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
    from launcher import api  # imports Hydra

    return api.sweep(*words, trials=trials, config_dir=config_dir, quiet=quiet)
