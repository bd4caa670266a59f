"""The words of `launch runs`: which runs it lists, in which order, and with which further columns."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli.listing import UNREADABLE
from launcher.cli.run_files import configuration_of
from launcher.errors import ConfigError, RunError, did_you_mean
from launcher.jobs.remote.states import LOST, QUEUED, STARTING, UNREACHABLE, WORKING
from launcher.runs import FINAL, SENT, RunDirectory

_SECONDS = {"min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)(min|h|d|w)")
# Name in `sort=` and `columns=` -> key of a row.
_FIELDS = {
    **{name: name for name in ("name", "status", "steps", "loss", "workers", "seconds", "cost_usd", "reason")},
    "state": "status",
    "step": "steps",
    "time": "seconds",
    "cost": "cost_usd",
}

STATES = (*FINAL, "running", "unknown", SENT, UNREADABLE, QUEUED, STARTING, WORKING, LOST, UNREACHABLE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Filter:
    """Selects and sorts the rows of `launch runs`.

    Attributes:
        states: list only runs in one of these states; all if empty.
        newest: list only runs that were started or resumed in this many seconds; None for all.
        sort: the name of a column, a configuration key, a tag, `started` or `best`; empty for the order of the start.
        descending: whether the largest value comes first.
        columns: configuration keys and tags to list in further columns.
    """

    states: tuple[str, ...] = ()
    newest: float | None = None
    sort: str = ""
    descending: bool = False
    columns: tuple[str, ...] = ()

    def apply(self, rows: Sequence[Row], root: Path) -> list[Row]:
        """Return the selected rows in order, each with `columns`: {name: value}.

        Args:
            root: the run root of the rows.

        Raises:
            ConfigError: no run has the key or tag of `sort` or of a column.
        """
        selected = [row for row in rows if not self.states or row["status"] in self.states]
        if self.newest is not None:
            oldest = time.time() - self.newest
            selected = [row for row in selected if _started(root, row) >= oldest]
        details = {row["name"]: _details(root, row) for row in selected} if self.columns or self.sort else {}
        for name in (*self.columns, *([self.sort] if self.sort not in ("", "best", "started") else [])):
            _require_known(name, selected, details)
        if self.sort:
            selected = self._sorted(selected, root, details)
        if self.columns:
            return [{**row, "columns": {name: _value(name, row, details) for name in self.columns}} for row in selected]
        return selected

    def _sorted(self, rows: list[Row], root: Path, details: dict[str, dict[str, Any]]) -> list[Row]:
        keys: dict[str, Callable[[Row], Any]] = {
            "started": lambda row: _started(root, row),
            "best": lambda row: _best(row, details),
        }
        key = keys.get(self.sort, lambda row: _value(self.sort, row, details))
        known = [row for row in rows if not _is_missing(key(row))]
        numeric = all(isinstance(key(row), (int, float)) for row in known)
        known.sort(key=key if numeric else lambda row: str(key(row)), reverse=self.descending)
        return [*known, *(row for row in rows if _is_missing(key(row)))]


def take_filter(words: Sequence[str]) -> tuple[Filter, list[str]]:
    """Return the filter that words of `launch runs` describe, and the other words.

    Raises:
        ConfigError: a value is invalid.
    """
    options: dict[str, Any] = {}
    others = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("state", "last", "sort", "columns"):
            others.append(word)
            continue
        parts = tuple(part for part in value.strip("[]").split(",") if part)
        if not parts:
            raise ConfigError(f"{key}= needs a value, such as {_EXAMPLES[key]}.", key=key)
        if key == "state":
            if unknown := [part for part in parts if part not in STATES]:
                raise ConfigError(
                    f"state={unknown[0]} is unknown. The states are {', '.join(STATES)}."
                    f"{did_you_mean(unknown[0], STATES)}",
                    key="state",
                )
            options["states"] = parts
        elif key == "columns":
            options["columns"] = parts
        elif key == "sort":
            options |= {"sort": value.lstrip("-"), "descending": value.startswith("-")}
        else:
            age = _AGE.fullmatch(value)
            if age is None:
                raise ConfigError(
                    f"last={value}: expected a number of min, h, d or w, such as {_EXAMPLES['last']}.", key="last"
                )
            options["newest"] = float(age[1]) * _SECONDS[age[2]]
    return Filter(**options), others


_EXAMPLES = {"state": "state=failed,lost", "last": "last=7d", "sort": "sort=best", "columns": "columns=optimizer.lr"}


def _details(root: Path, row: Row) -> dict[str, Any]:
    """Return the configuration keys and the tags of a run, none of a run that cannot be read."""
    run = RunDirectory(root / row["name"])
    try:
        return {**configuration_of(run), **(run.result().get("metrics") or {})}
    except RunError:
        return {}


def _require_known(name: str, rows: Sequence[Row], details: dict[str, dict[str, Any]]) -> None:
    known = sorted({*_FIELDS, *(key for each in details.values() for key in each)})
    if rows and name not in known:
        raise ConfigError(f'No run has a configuration key or a tag "{name}".{did_you_mean(name, known)}')


def _value(name: str, row: Row, details: dict[str, dict[str, Any]]) -> Any:
    found = details[row["name"]]
    return found[name] if name in found else row.get(_FIELDS.get(name, ""))


def _best(row: Row, details: dict[str, dict[str, Any]]) -> float | None:
    """Return the best value of a run, negated if larger values are better, so that the best run comes first."""
    best = row["best"]
    if best is None:
        return None
    return -best["value"] if details[row["name"]].get("checkpoint.mode") == "max" else best["value"]


def _started(root: Path, row: Row) -> float:
    try:
        return RunDirectory(root / row["name"]).config.lstat().st_mtime
    except OSError:
        return 0.0


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
