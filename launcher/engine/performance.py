"""Computes the tags of a log interval that do not come from the model: throughput, memory, cluster."""

from __future__ import annotations

from launcher.engine import hardware
from launcher.engine.advice import Advice
from launcher.engine.checkpoint import SavedCheckpoint
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.pace import Pace
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime
from launcher.engine.throughput import Throughput


class Performance:
    """Measures the intervals between two logs.

    Args:
        peak_share: seconds of one sample at the device's peak rate (see `peaks.share_of_a_sample`), or None.
        advice: the prediction to compare with, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        throughput: Throughput,
        pace: Pace,
        global_batch_size: int,
        peak_share: float | None,
        advice: Advice | None,
        uploads: Uploads | None,
    ) -> None:
        self._runtime, self._throughput, self._pace, self._uploads = runtime, throughput, pace, uploads
        self._global_batch_size, self._peak_share, self._advice = global_batch_size, peak_share, advice

    def interval(self, progress: Progress, last_save: SavedCheckpoint | None) -> dict[str, float]:
        """Close the interval and return its tags. Rank 0 reports the pace of steps and saves to the runner."""
        values = self._throughput.interval()
        rate = values["throughput/samples_per_second"]
        seconds = self._global_batch_size / max(rate, 1e-9)  # of a step
        if self._runtime.is_first:
            self._pace.update(seconds, last_save, 0.0 if self._uploads is None else self._uploads.seconds)
        if self._advice is not None:
            values["throughput/predicted_ratio"] = self._advice.step.seconds / seconds
        if self._peak_share is not None:
            values["throughput/mfu"] = rate / self._runtime.world_size * self._peak_share
        values["memory/allocated_gib"] = hardware.allocated_gib(self._runtime.device)
        values["cluster/workers"] = float(self._runtime.world_size)
        values["cluster/restarts"] = float(progress.restarts)
        return values
