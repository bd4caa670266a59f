"""Processes measured figures: medians and spread, requirements, the machine, the table and its JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "ray", "hydra-core", "tensorboard", "accelerate", "lightning", "optuna")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The median of some values, and their quartiles."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def text(self, digits: int) -> str:
        low, high = self.quartiles
        return f"{self.median:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"

    def to_dict(self) -> Figures:
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "values": list(self.values)}


def spread(runs: Sequence[Figures], key: str) -> Spread:
    return Spread([float(one[key]) for one in runs])


def ratio(above: Sequence[Figures], below: Sequence[Figures], key: str) -> Spread:
    """Return the ratio of each round, so that disturbances of a whole round cancel."""
    return Spread([float(a[key]) / float(b[key]) for a, b in zip(above, below, strict=True)])


@dataclass(frozen=True)
class Demand:
    """A requirement on the median of a ratio: at least `least`, at most `most`."""

    least: float | None = None
    most: float | None = None

    def met_by(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def text(self, value: float) -> str:
        bounds = [f"≥ {self.least:g}"] if self.least is not None else []
        bounds += [f"≤ {self.most:g}"] if self.most is not None else []
        return f"{' and '.join(bounds)}: {'met' if self.met_by(value) else 'NOT met'}" if bounds else ""


# ---- what is printed ------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """The result of a benchmark: a Markdown table, and JSON for programs.

    `rows` are those of the table, a mapping of heading to text; `content` is the additional content of the JSON.
    """

    name: str
    settings: Figures
    environment: Figures = field(default_factory=lambda: environment())
    rows: list[dict[str, str]] = field(default_factory=list)
    content: Figures = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def print(self) -> None:
        here = self.environment
        print(f"\n## {self.name}, {here['date']}, commit {here['commit']}\n")
        print(f"{here['machine']}; load {here['load']} at the start, {load()} at the end.")
        print(", ".join(f"{name} {found}" for name, found in here["versions"].items()) + ".")
        print(", ".join(f"{key} {value}" for key, value in self.settings.items()) + ".\n")
        print(table(self.rows))
        for remark in self.remarks:
            print(f"\n{remark}")

    def to_dict(self) -> Figures:
        return {
            "benchmark": self.name,
            "environment": {**self.environment, "load_at_end": load()},
            "settings": self.settings,
            "rows": self.rows,
            **self.content,
            "remarks": self.remarks,
        }

    def finish(self, file: str | None) -> None:
        """Print the table, and write the JSON if requested."""
        self.print()
        if file:
            Path(file).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table with aligned columns; every row has the keys of the first."""
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    lines = [heads, ["-" * width for width in widths], *([row[head] for head in heads] for row in rows)]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def environment() -> Figures:
    """Return machine, versions, commit and date, without which a figure is meaningless."""
    versions = {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(),
        "load": LOAD_AT_START,
        "versions": {name: found for name, found in versions.items() if found},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit, and whether the code that ran differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=10", "HEAD") or "unknown"
        changed = git("status", "--porcelain", "--", "launcher", "models", "conf")
        return f"{found} with uncommitted changes" if changed else found
    except OSError:  # no git here
        return "unknown"


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = ""
    with suppress(OSError, ValueError):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"{cores} cores of {name}{memory}, {platform.system()} {platform.release()}"


def load() -> str:
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return "unknown"


LOAD_AT_START = load()
