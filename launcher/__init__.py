"""Distributed PyTorch training from a Hydra configuration.

>>> from launcher import launch
>>> result = launch("experiment=mnist", "trainer.epochs=1")
>>> result["metrics"]["val/accuracy"]
"""

from __future__ import annotations

from os import PathLike
from typing import Any

__all__ = ["launch"]


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

    from launcher import jobs
    from launcher.errors import Stopped

    chosen = config_dir or os.environ.get("LAUNCH_CONFIG_DIR")
    request = jobs.Request(words, Path(chosen).expanduser().absolute() if chosen else None)
    try:
        if quiet:
            return jobs.train(request, jobs.Observer()).result
        from launcher.show import Shown, conclusion
        from launcher.terminal import Display

        with Display() as display:
            shown = Shown(display)
            outcome = jobs.train(request, shown)
            if not shown.finished:
                for text in conclusion(outcome, interactive=False):
                    display.say(text)
            return outcome.result
    except Stopped:
        raise KeyboardInterrupt from None
