"""What is done with a run's best checkpoint: evaluate, predict, export."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.output import results_alone
from launcher.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from launcher.cli.line import Line


def evaluate(line: Line) -> int:
    from launcher.cli.display import Shown
    from launcher.cli.terminal import Display
    from launcher.jobs import ranks, trained, training

    assert line.name is not None
    with results_alone() as result:
        if not ranks.prints():
            trained.evaluate(line.name, line.request(), training.Observer())
            return 0
        with Display() as display:
            metrics = trained.evaluate(line.name, line.request(), Shown(display))
        result(json.dumps(metrics))
    return 0


def predict(line: Line) -> int:
    from launcher.cli.display import Shown
    from launcher.cli.terminal import Display
    from launcher.jobs import ranks, trained

    assert line.name is not None
    if line.input is None:
        wanted = f"launch predict {line.name} input=PATH"
        raise ConfigError(f"launch predict needs the inputs: {wanted}, a file or folder that the run's data can read.")
    if not ranks.prints():  # of several ranks one is enough
        return 0
    with results_alone() as result, Display() as display:

        def take(prediction: dict[str, Any]) -> None:
            try:
                result(json.dumps(prediction))
            except BrokenPipeError:  # `launch predict … | head`: nobody listens any more
                raise Stopped(signal.SIGPIPE) from None

        trained.predict(line.name, line.request(), line.input, Shown(display), take)
    return 0


def export(line: Line) -> int:
    from launcher import runs
    from launcher.cli.display import Shown
    from launcher.cli.terminal import Display
    from launcher.errors import ExportError
    from launcher.jobs import ranks, trained

    assert line.name is not None
    if not ranks.prints():
        return 0
    with results_alone() as result:
        folders: list[Path] = []
        try:
            with Display() as display:
                trained.export(line.name, line.request(), Shown(display), folders.append)
        except ExportError:
            result(runs.RunDirectory(folders[-1].parent).told(folders[-1]))  # the weights are there
            raise
        result(runs.RunDirectory(folders[-1].parent).told(folders[-1]))
    return 0
