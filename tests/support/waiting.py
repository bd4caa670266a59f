"""Waiting for what another process does, for as long as it may take and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 3  # times what a quiet machine needs: the cores may be shared with other work


def wait_for(condition: Callable[[], Any], seconds: float = 20.0, complaint: Callable[[], object] | str = "") -> None:
    """Return as soon as the condition holds; fail with the complaint where it does not within so many seconds."""
    latest = time.monotonic() + PATIENCE * seconds
    while not condition():
        if time.monotonic() > latest:
            reason = complaint if isinstance(complaint, str) else complaint()
            raise AssertionError(f"it did not happen within {seconds:g} s: {reason}")
        time.sleep(0.05)
