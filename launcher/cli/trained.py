"""`launch evaluate`, `predict` and `export`: use a run's best checkpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from launcher.cli.display import RunDisplay
from launcher.cli.line import Line
from launcher.cli.output import results_only
from launcher.cli.requests import request_of
from launcher.cli.terminal import Display
from launcher.errors import ConfigError, ExportError, Stopped
from launcher.jobs import ranks, trained, training
from launcher.runs import RunDirectory


def evaluate(line: Line) -> int:
    """Run `launch evaluate`: print the metrics as one JSON object."""
    assert line.name is not None
    with results_only() as result:
        if not ranks.prints():
            trained.evaluate(line.name, request_of(line), training.Observer(), line.rows)
            return 0
        with Display() as display:
            metrics = trained.evaluate(line.name, request_of(line), RunDisplay(display), line.rows)
        result(json.dumps(metrics))
    return 0


def predict(line: Line) -> int:
    """Run `launch predict`: print one JSON object for each input. With several ranks only the first one predicts."""
    assert line.name is not None
    if line.input is None:
        raise ConfigError(
            f"launch predict needs inputs: launch predict {line.name} input=PATH, a file or folder that the run's data "
            "can read."
        )
    if not ranks.prints():
        return 0
    with results_only() as result, Display() as display:

        def print_prediction(prediction: dict[str, Any]) -> None:
            try:
                result(json.dumps(prediction))
            except BrokenPipeError:  # `launch predict ... | head`: no reader is left
                raise Stopped(signal.SIGPIPE) from None

        trained.predict(line.name, request_of(line), line.input, RunDisplay(display), print_prediction)
    return 0


def export(line: Line) -> int:
    """Run `launch export`: print the folder of the exported weights and network. Only the first rank exports."""
    assert line.name is not None
    if not ranks.prints():
        return 0
    with results_only() as result:
        folders: list[Path] = []
        try:
            with Display() as display:
                trained.export(line.name, request_of(line), RunDisplay(display), folders.append)
        except ExportError:
            result(RunDirectory(folders[-1].parent).display_path(folders[-1]))  # it contains the weights
            raise
        result(RunDirectory(folders[-1].parent).display_path(folders[-1]))
    return 0
