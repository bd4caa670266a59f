"""Measures the time between the command and the first step: a list of phases, each with its start time.

The phases in order: configuration, imports (PyTorch, in the driver), check (data, network and a small batch), ray,
workers (Ray Train starts their processes), worker_imports, process_group, data, model, first_step. Without Ray the
phases between check and data are missing. With several workers, the phases of rank 0 are reported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Marks:
    """Start times of the phases, by the wall clock. The driver sends them to the workers."""

    begun: list[tuple[str, float]] = field(default_factory=list)

    def begin(self, phase: str, at: float | None = None) -> None:
        """Start a phase and end the one before it. at: the start time; now by default."""
        self.begun.append((phase, time.time() if at is None else at))

    def seconds(self, end: float) -> dict[str, float]:
        """Return the length of each phase in seconds; the last phase ends at `end`.

        The clocks of two machines may differ, so a negative length is replaced by 0.
        """
        ends = [at for _, at in self.begun[1:]] + [end]
        lengths: dict[str, float] = {}
        for (phase, at), until in zip(self.begun, ends, strict=True):
            lengths[phase] = round(lengths.get(phase, 0.0) + max(0.0, until - at), 3)
        return lengths


def describe(seconds: dict[str, float]) -> str:
    """Return the phases as one line: `first step after 11.3s: configuration 0.4, imports 1.1, …`."""
    parts = ", ".join(f"{phase.replace('_', ' ')} {length:.1f}" for phase, length in seconds.items())
    return f"first step after {sum(seconds.values()):.1f}s: {parts}"
