"""The record of failed VM launches, a file that Ray's provider writes and `launch up` and `launch status` read.

Without it, the reason why a node was not created would be only in the log of the autoscaler on the head.
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

VARIABLE = "LAUNCH_FAILURES"  # path of the file; default: the one on the head
EXPIRY_SECONDS = 1800.0  # capacity changes: after this time a failed launch no longer counts
_LONGEST = 600
SPOT, ON_DEMAND = "spot", "on-demand"
# Azure's error codes for missing capacity, as opposed to a wrong request. Another zone, region or size may have some.
CAPACITY = frozenset(
    {
        "SkuNotAvailable",
        "AllocationFailed",
        "ZonalAllocationFailed",
        "OverconstrainedAllocationRequest",
        "OverconstrainedZonalAllocationRequest",
        "QuotaExceeded",
        "OperationNotAllowed",  # a quota error if a VM is created without a deployment
    }
)


@dataclass(frozen=True)
class LaunchFailure:
    """A failed launch.

    Attributes:
        kind: SPOT, ON_DEMAND, or "" for the head.
        count: the number of VMs that were requested.
        code, message: Azure's error.
        at: seconds since the epoch, by the clock of the machine that recorded it.
    """

    kind: str
    count: int
    code: str
    message: str
    at: float

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def path() -> Path:
    """Return the path of the record."""
    return Path(os.environ.get(VARIABLE) or f"{DIRECTORY}/failures.jsonl")


def add(failure: LaunchFailure) -> None:
    """Append a failure to the record."""
    with path().open("a") as file:
        file.write(json.dumps(asdict(failure)) + "\n")


def forget(kind: str) -> None:
    """Remove the failures of this kind. Called after a successful launch."""
    failures = read()
    others = [failure for failure in failures if failure.kind != kind]
    if len(others) < len(failures):
        path().write_text("".join(json.dumps(asdict(failure)) + "\n" for failure in others))


def read() -> list[LaunchFailure]:
    """Return the recorded failures, oldest first."""
    try:
        lines = path().read_text().splitlines()
    except OSError:
        return []
    return [LaunchFailure(**json.loads(line)) for line in lines if line.endswith("}")]


def recent(kind: str, now: float | None = None) -> int:
    """Return how many launches of this kind failed since the last success, within EXPIRY_SECONDS."""
    now = time.time() if now is None else now
    return sum(1 for failure in read() if failure.kind == kind and now - failure.at < EXPIRY_SECONDS)


def failure_of(error: Exception, kind: str, count: int) -> LaunchFailure:
    """Return a failure for an error of Azure's SDK, with its innermost cause. Outer errors name no cause."""
    found: Any = getattr(error, "error", None)
    code, message = getattr(found, "code", None) or type(error).__name__, str(getattr(found, "message", "") or error)
    while details := getattr(found, "details", None):
        found = details[0]
        code, message = found.code or code, found.message or message
    # The message of a deployment error contains the response of the failing service as JSON.
    with_code = re.search(r'"code"\s*:\s*"(\w+)".*?"message"\s*:\s*"((?:[^"\\]|\\.)*)"', message, re.DOTALL)
    if with_code:
        code, message = with_code[1], with_code[2]
    return LaunchFailure(kind, count, str(code), " ".join(str(message).split())[:_LONGEST], time.time())
