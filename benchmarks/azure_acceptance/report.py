"""The report of an acceptance run: one row per check, without anything that identifies the account or a machine."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.config import masking

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
_PATTERNS = (
    (r"-----BEGIN [^-]*-----.*?-----END [^-]*-----", "<key>"),
    (r"\b(?:abfss?|https?|az|wasbs?)://\S+", "<url>"),
    (r"/subscriptions/\S+", "<resource>"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "<id>"),
    (r"\b[\w.+-]+@[\w.-]+\.\w+\b", "<user>"),
    (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "<address>"),
    (r"\b(?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}\b|\b(?:[0-9a-f]{1,4}:)+:[0-9a-f:]*", "<address>"),
    (r"\bray-[a-z][\w-]*\d[\w-]*", "<host>"),
    (r"\b[\w-]+(?:\.[\w-]+)*\.(?:azure\.com|windows\.net|internal|local)\b", "<host>"),
    (r"(?:/home|/Users)/[^/\s:'\"]+", "<home>"),
    (r"\b(?:eyJ[\w-]{8,}\.[\w-]+\.[\w-]+|[0-9a-f]{32,}|[A-Za-z0-9+/]{40,}={0,2})", "<secret>"),
)


class Scrubber:
    """Removes secrets, ids, addresses and names of machines and users from text."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self.learn([socket.gethostname(), socket.getfqdn()])
        self.learn({getpass.getuser()} - {"root", "ubuntu"})

    def learn(self, names: Iterable[str]) -> None:
        """Hide these names from now on, such as those of the VMs."""
        self._names |= {name for name in names if len(name) > 1 and name != "localhost"}

    def __call__(self, value: Any) -> Any:
        """Return a text, or the texts of a nested structure, without them."""
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        if not isinstance(value, str):
            return value
        text = masking.hide(value)
        for pattern, instead in _PATTERNS:
            text = re.sub(pattern, instead, text, flags=re.IGNORECASE | re.DOTALL)
        for name in sorted(self._names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<host>", text, flags=re.IGNORECASE)
        return text


@dataclass(frozen=True)
class Row:
    """One check. found: the measurement; asked: the requirement."""

    check: str
    found: str
    asked: str
    verdict: str


def judged(check: str, found: str, asked: str, passes: bool) -> Row:
    return Row(check, found, asked, PASSED if passes else FAILED)


def not_checked(check: str, why: str, asked: str = "") -> Row:
    return Row(check, f"{NOT_CHECKED}: {why}", asked, NOT_CHECKED)


@dataclass
class Report:
    """The rows so far, and facts about the run as a whole. `directory` gets report.md and report.json."""

    directory: Path
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    scrub: Scrubber = field(default_factory=Scrubber)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == FAILED]

    def write(self) -> None:
        """Write both files; called after every row, so an interrupted run keeps its findings."""
        facts, rows = self.scrub(self.facts), [Row(**self.scrub(asdict(row))) for row in self.rows]
        content = {**facts, "checks": [asdict(row) for row in rows]}
        (self.directory / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        (self.directory / "report.md").write_text(_markdown(facts, rows))


def _markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    counts = ", ".join(f"{sum(row.verdict == one for row in rows)} {one}" for one in (PASSED, FAILED, NOT_CHECKED))
    lines = ["# Acceptance run of `cluster=azure`", "", f"{counts}.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| check | found | asked | verdict |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in asdict(row).values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
