"""report.html at the end of a sweep."""

from __future__ import annotations

from launcher.runs import RunDirectory
from launcher.sweeps.study import Study


def write_report(directory: RunDirectory, study: Study) -> None:
    """Placeholder until the first sweep runs."""
