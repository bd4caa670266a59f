"""Converts a parsed command line into a request for a job."""

from __future__ import annotations

from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.jobs import ranks
from launcher.jobs.prepare import Request


def request_of(line: Line) -> Request:
    """Return the request of a command line. Its notes are printed to standard error, by one rank only."""
    note = say if ranks.prints() else lambda text: None
    return Request(line.words, line.config_dir, started=line.started, note=note)
