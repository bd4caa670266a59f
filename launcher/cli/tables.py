"""The console for tables that a verb prints as its result."""

from __future__ import annotations

from rich.console import Console


class ResultConsole(Console):
    """A console for tables on standard output. Raises BrokenPipeError, where rich itself exits with status 1."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 (called while the exception is handled)
