"""Where the time between the command and the first step goes: a list of phases, each with the moment it began.

In their order: configuration, imports (PyTorch, in the driver), check (data, network and a small batch), ray, workers
(Ray Train starts their processes), worker_imports, process_group, data, model, first_step. Without Ray those between
check and data are missing. Of several workers rank 0's are told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Marks:
    """Moments at which phases began, by the wall clock: they travel from the driver to the workers."""

    begun: list[tuple[str, float]] = field(default_factory=list)

    def begin(self, phase: str, at: float | None = None) -> None:
        """The phase begins, and the one before it ends."""
        self.begun.append((phase, time.time() if at is None else at))

    def seconds(self, end: float) -> dict[str, float]:
        """Return the length of each phase, where the last one ended at `end`; they add up to the whole.

        On another machine the clock may go differently: no phase is shorter than nothing.
        """
        ends = [at for _, at in self.begun[1:]] + [end]
        lengths: dict[str, float] = {}
        for (phase, at), until in zip(self.begun, ends, strict=True):
            lengths[phase] = round(lengths.get(phase, 0.0) + max(0.0, until - at), 3)
        return lengths


def describe(seconds: dict[str, float]) -> str:
    """Return the phases in one line: `first step after 11.3s: configuration 0.4, imports 1.1, …`."""
    parts = ", ".join(f"{phase.replace('_', ' ')} {length:.1f}" for phase, length in seconds.items())
    return f"first step after {sum(seconds.values()):.1f}s: {parts}"
