"""The result of a run with its curves, for the Python API and notebooks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from launcher.runs.directory import RunDirectory
from launcher.runs.plain_files import read_text

_STEP = "step"
_DEFAULT = ("train/loss", "val/loss")


class Result(dict[str, Any]):
    """The content of a run's `result.json`.

    Attributes:
        directory: the run's directory.
    """

    def __init__(self, content: Mapping[str, Any], directory: RunDirectory) -> None:
        super().__init__(content)
        self.directory = directory.path

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the steps and the values of each tag, as in metrics.jsonl."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        with suppress(FileNotFoundError):
            for line in read_text(RunDirectory(self.directory).metrics).splitlines():
                with suppress(ValueError):  # the process was killed while it wrote the line
                    entry = json.loads(line)
                    for tag, value in entry.items():
                        if "/" in tag and isinstance(value, (int, float)):
                            steps, values = found.setdefault(tag, ([], []))
                            steps.append(entry[_STEP])
                            values.append(value)
        return found

    def plot(self, *tags: str) -> Any:
        """Draw curves over the steps, and return the matplotlib figure, which a notebook shows.

        Args:
            tags: by default the losses of training and validation.

        Raises:
            ValueError: the run has no values of a tag.
        """
        curves = self.curves()
        chosen = tags or tuple(tag for tag in _DEFAULT if tag in curves)
        if missing := [tag for tag in chosen if tag not in curves]:
            raise ValueError(
                f"The run has no values of {missing[0]}. It has {', '.join(sorted(curves)) or 'no values'}."
            )
        from matplotlib.figure import Figure  # takes long; not pyplot, which has global state and windows

        class Curves(Figure):
            def _repr_png_(self) -> bytes:  # a notebook shows a plain Figure as text unless pyplot is set up
                file = io.BytesIO()
                self.savefig(file, format="png")
                return file.getvalue()

        figure = Curves(layout="constrained")
        axes = figure.add_subplot()
        for tag in chosen:
            axes.plot(*curves[tag], label=tag, marker="." if len(curves[tag][0]) < 50 else None)
        axes.set_xlabel(_STEP)
        axes.set_title(self.directory.name)
        if chosen:
            axes.legend()
        return figure
