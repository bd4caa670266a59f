"""Shows a run in a notebook: one line of progress that is updated in place, so that a long run fills no page."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from launcher.cli.terminal import Display
from launcher.formatting import evaluation, step_line

_SECONDS = 0.5  # between two updates


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook. It does not import IPython."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookDisplay(Display):
    """Prints notes and the lines of the user's code as `Display`, and updates one line of progress in place."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None
        self._shown = 0.0
        self._latest: dict[str, float] = {}  # the last evaluation

    def _progress(self, event: Mapping[str, Any]) -> None:
        values = event["values"]
        if evaluation(values):
            self._latest = dict(values)
        now = time.monotonic()
        if now - self._shown < _SECONDS and event["step"] < event["total_steps"]:
            return
        self._shown = now
        content = {"text/plain": step_line({**event, "values": self._latest})}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
