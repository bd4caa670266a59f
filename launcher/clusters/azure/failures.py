"""Launches of VMs that failed, kept in a file: Ray's provider writes it, `launch up` and `launch status` read it.

Why a node never comes is known to the head's autoscaler alone, deep in its logs.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.clusters.azure.spec import DIRECTORY

VARIABLE = "LAUNCH_FAILURES"  # the file, where it is not the head's
FORGOTTEN_SECONDS = 1800.0  # capacity comes and goes: after this Azure is asked again
_LONGEST = 600
SPOT, ON_DEMAND = "spot", "on-demand"
# What Azure calls a want of machines, as opposed to a wrong request: another zone, region or size may have some.
CAPACITY = frozenset(
    {
        "SkuNotAvailable",
        "AllocationFailed",
        "ZonalAllocationFailed",
        "OverconstrainedAllocationRequest",
        "OverconstrainedZonalAllocationRequest",
        "QuotaExceeded",
        "OperationNotAllowed",  # a quota, where a VM is made without a deployment
    }
)


@dataclass(frozen=True)
class LaunchFailure:
    """One launch that failed. kind: SPOT, ON_DEMAND, or "" for the head; at: seconds since the epoch."""

    kind: str
    count: int
    code: str
    message: str
    at: float

    @property
    def words(self) -> str:
        return f"{self.code}: {self.message}"


def path() -> Path:
    return Path(os.environ.get(VARIABLE) or f"{DIRECTORY}/failures.jsonl")


def add(failure: LaunchFailure) -> None:
    with path().open("a") as file:
        file.write(json.dumps(asdict(failure)) + "\n")


def forget(kind: str) -> None:
    """A launch of this kind went well: what failed before counts no more."""
    found = read()
    left = [failure for failure in found if failure.kind != kind]
    if len(left) < len(found):
        path().write_text("".join(json.dumps(asdict(failure)) + "\n" for failure in left))


def read() -> list[LaunchFailure]:
    """Return what failed, oldest first."""
    try:
        lines = path().read_text().splitlines()
    except OSError:
        return []
    return [LaunchFailure(**json.loads(line)) for line in lines if line.endswith("}")]


def recent(kind: str, now: float | None = None) -> int:
    """Return how many launches of this kind failed since the last that went well, and not long ago."""
    now = time.time() if now is None else now
    return sum(1 for failure in read() if failure.kind == kind and now - failure.at < FORGOTTEN_SECONDS)


def failure_of(error: Exception, kind: str, count: int) -> LaunchFailure:
    """Return what an error of Azure's SDK says, by its innermost cause: the outer ones say "deployment failed" only."""
    found: Any = getattr(error, "error", None)
    code, message = getattr(found, "code", None) or type(error).__name__, str(getattr(found, "message", "") or error)
    while details := getattr(found, "details", None):
        found = details[0]
        code, message = found.code or code, found.message or message
    # A deployment quotes the answer of the service that refused, as JSON in its message.
    with_code = re.search(r'"code"\s*:\s*"(\w+)".*?"message"\s*:\s*"((?:[^"\\]|\\.)*)"', message, re.DOTALL)
    if with_code:
        code, message = with_code[1], with_code[2]
    return LaunchFailure(kind, count, str(code), " ".join(str(message).split())[:_LONGEST], time.time())
