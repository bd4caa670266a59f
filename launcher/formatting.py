"""Numbers and positions as people read them: on the terminal, in log.txt and in tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def goes_on(name: str) -> str:
    """Return what is told when somebody leaves a run that is driven elsewhere."""
    return f"{name} goes on without this command. Follow it with: launch logs {name}; stop it with: launch stop {name}"


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
    """Return a metric with four digits after the point, or in scientific form where those would say nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def facts(event: Mapping[str, Any], brief: bool = False) -> str:
    """Return where a run stands by a progress event: epoch, loss and, unless `brief`, speed and time left."""
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
    """Return one line for a step that was logged, with what was evaluated. brief: without speed and time left."""
    begin = f"step {event['step']}/{event['total_steps']}"
    return "  ".join([begin, facts(event, brief), *evaluated(event["values"])])


def evaluated(values: Mapping[str, float | None]) -> list[str]:
    """Return the metrics of the validation and test sets, one text each, losses first."""
    tags = [tag for tag in values if tag.startswith(("val/", "test/"))]
    tags.sort(key=lambda tag: not tag.endswith("/loss"))
    return [f"{tag} {number(value)}" for tag in tags if (value := values[tag]) is not None]
