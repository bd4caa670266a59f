"""Formats numbers, durations and progress for the terminal, log.txt and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def detached(name: str) -> str:
    """Return the line that is printed when the user detaches from a remote run."""
    return f"Detached. {name} continues to run. Follow it with: launch logs {name}. Stop it with: launch stop {name}"


def duration(seconds: float) -> str:
    """Return seconds as `0.4s`, `12s`, `3m05s` or `2h07m`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def count(number: float, noun: str) -> str:
    """Return `1 step`, `2 steps`, `1,037 samples`."""
    return f"{number:,g} {noun}" if number == 1 else f"{number:,.10g} {noun}s"


def size(number_of_bytes: float) -> str:
    """Return `8 B`, `1.5 KiB`, `343.6 KiB`, `20.0 GiB`."""
    left, units = float(number_of_bytes), ["KiB", "MiB", "GiB", "TiB"]
    if left < 1024:
        return f"{left:.0f} B"
    while (left := left / 1024) >= 1024 and len(units) > 1:
        units.pop(0)
    return f"{left:,.1f} {units[0]}"


def number(value: float) -> str:
    """Return a metric with four digits after the point, or in scientific notation if it is very small or large."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def facts(event: Mapping[str, Any], brief: bool = False) -> str:
    """Return the facts of a progress event: epoch, loss and, unless `brief`, speed and time left."""
    parts = [f"epoch {event['epoch']:.2f}"]
    if event.get("loss") is not None:
        parts.append(f"loss {number(event['loss'])}")
    if brief:
        return "  ".join(parts)
    if event.get("samples_per_second"):
        parts.append(f"{event['samples_per_second']:,.0f} samples/s")
    if event.get("seconds_left") is not None and event["step"] < event["total_steps"]:
        parts.append(f"{duration(event['seconds_left'])} left")
    return "  ".join(parts)


def step_line(event: Mapping[str, Any], brief: bool = False) -> str:
    """Return one line for a logged step, with its evaluation. brief: without speed and time left."""
    begin = f"step {event['step']}/{event['total_steps']}"
    return "  ".join([begin, facts(event, brief), *evaluation(event["values"])])


def evaluation(values: Mapping[str, float | None]) -> list[str]:
    """Return `tag value` for each metric of the validation and test sets, losses first."""
    tags = [tag for tag in values if tag.startswith(("val/", "test/"))]
    tags.sort(key=lambda tag: not tag.endswith("/loss"))
    return [f"{tag} {number(value)}" for tag in tags if (value := values[tag]) is not None]
