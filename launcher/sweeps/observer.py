"""The interface between a sweep and its caller: progress while it runs, and the outcome at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.jobs.training import Observer
from launcher.runs import RunDirectory

Event = dict[str, Any]


@dataclass(frozen=True)
class Headline:
    """The start of a sweep: a one-line summary, the swept keys, and the number of trials.

    Attributes:
        finished: all trials have ended already.
    """

    text: str
    keys: list[str]
    total: int
    finished: bool = False


class SweepObserver(Observer):
    """Receives the progress of a sweep. All methods do nothing by default."""

    def event(self, event: Event) -> None:
        """Receive an event before the first trial: a phase, or output of the user's code during checks."""

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        """Receive the directory and the summary of the sweep, when it starts."""

    def trial(self, number: int, event: Event) -> None:
        """Receive an event of a running trial."""

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        """Receive all trials (see `records.rows`) when a trial starts or ends.

        Args:
            facts: `best` (number of a trial or None) and `seconds_left` (None if unknown).
        """

    def say(self, text: str) -> None:
        """Receive one line of text for the user."""


@dataclass(frozen=True)
class SweepOutcome:
    """The outcome of a sweep.

    Attributes:
        result: content of its result.json.
        trials: see `records.rows`.
        best: see `records.best`.
        signal_number: the signal that stopped it, or None.
        root: `run.root` as given.
        detached: it continues on a cluster, and the caller no longer follows it.
        exit_rule: `sweep.exit`.
    """

    result: dict[str, Any]
    directory: RunDirectory
    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    signal_number: int | None = None
    root: str = "runs"
    detached: bool = False
    exit_rule: str = "all_failed"
