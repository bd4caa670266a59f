"""What a result.json may hold, so that what reads it need not ask: it may come from a stranger, or from a full disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TEXTS = ("status", "reason", "error", "checkpoint", "user")
_NUMBERS = (
    *("steps", "epochs", "samples", "workers", "restarts", "preemptions", "lost_steps", "seconds"),
    *("seconds_to_first_step", "samples_per_second", "cost_usd"),
)
_MAPPINGS = ("metrics", "best", "trials", "versions", "git", "phases")
_LARGEST = 1e18  # of a count, or of seconds


def problem_of(content: Any) -> str | None:
    """Return what is wrong with the content of a result.json; None where each known key has its type."""
    if not isinstance(content, Mapping):
        return f"it holds {_kind(content)} instead of a mapping"
    expected = [(key, str, "a text") for key in _TEXTS] + [(key, Mapping, "a mapping") for key in _MAPPINGS]
    for key, kind, name in expected:
        value = content.get(key)
        if value is not None and not isinstance(value, kind):
            return f"{key} is {_kind(value)} instead of {name}"
    for key in _NUMBERS:
        if not _is_count(content.get(key)):
            return f"{key} is no number that it can be"
    best = content.get("best") or {}
    if best and not (isinstance(best.get("tag"), str) and _is_value(best.get("value")) and _is_count(best.get("step"))):
        return "best does not give tag, value and step"
    for tag, value in (content.get("metrics") or {}).items():
        if value is not None and not _is_value(value):
            return f"the metric {tag} is {_kind(value)} instead of a number"
    return None


def _is_count(value: Any) -> bool:
    return value is None or (_is_value(value) and math.isfinite(value) and abs(value) <= _LARGEST)


def _is_value(value: Any) -> bool:
    """Whether it is a number, also one that is not finite, as of a run whose loss became NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= _LARGEST


def _kind(value: Any) -> str:
    if isinstance(value, (int, float)):
        return "true or false" if isinstance(value, bool) else "a number"
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text"}
    return names.get(type(value), "nothing")
