"""What the caller of a sweep hears while it runs, and gets when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.jobs.training import Observer
from launcher.runs import RunDirectory

Event = dict[str, Any]


@dataclass(frozen=True)
class Headline:
    """What is told of a sweep when it begins: a sentence, the swept keys, and how many trials it has."""

    text: str
    keys: list[str]
    total: int
    finished: bool = False


class SweepObserver(Observer):
    """What the caller wants to hear of a sweep."""

    def event(self, event: Event) -> None:
        """Before the first trial: what the user's code prints while it is tried out, and phases."""

    def begun(self, directory: RunDirectory, headline: Headline) -> None:
        """The sweep is known, and what it will do."""

    def trial(self, number: int, event: Event) -> None:
        """An event of a trial that runs."""

    def changed(self, table: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        """A trial began or ended. `facts`: best (a number or None), seconds_left (None while unknown)."""

    def say(self, text: str) -> None:
        """One line for the user."""


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended: its result.json, its trials (see `records.rows`), the best one's words, and the signal.

    root: run.root as it was said. detached: it goes on elsewhere, and nobody here follows it.
    """

    result: dict[str, Any]
    directory: RunDirectory
    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    signal_number: int | None = None
    root: str = "runs"
    detached: bool = False
