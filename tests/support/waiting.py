"""Waiting for what another process does, for as long as it may take and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# In seconds. Only a failure takes so long; a busy machine may need a hundred times as long as a quiet one.
LIMIT = 240.0
_PATIENCE = 3  # times what a quiet machine needs, for steps that take minutes


def limit(seconds: float) -> float:
    """Return how long to wait for a step that takes at most `seconds` on a quiet machine."""
    return max(LIMIT, _PATIENCE * seconds)


def wait_for(condition: Callable[[], Any], seconds: float = 20.0, complaint: Callable[[], object] | str = "") -> None:
    """Return as soon as the condition holds; fail with the complaint where it does not within `limit(seconds)`."""
    latest = time.monotonic() + limit(seconds)
    while not condition():
        if time.monotonic() > latest:
            reason = complaint if isinstance(complaint, str) else complaint()
            raise AssertionError(f"it did not happen within {limit(seconds):g} s: {reason}")
        time.sleep(0.05)
