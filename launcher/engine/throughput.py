"""Measures the training throughput, and the time in which the device waits for data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Measures samples per second of training, without the time of evaluation and saving.

    It measures the intervals between two logs. The value of the run is their median without the first interval.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to measure now, and discard earlier measurements."""
        self._started = time.perf_counter()
        self._samples = 0
        self._paused = 0.0
        self._waited = 0.0
        self._rates: list[float] = []

    def step(self, samples: int) -> None:
        self._samples += samples

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside the context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def waited(self, seconds: float) -> None:
        """Add time in which the device had no batch to compute."""
        self._waited += seconds

    def interval(self) -> dict[str, float]:
        """Close the interval and return its tags."""
        now = time.perf_counter()
        trained = max(now - self._started - self._paused, 1e-9)
        rate = self._samples / trained
        tags = {
            "throughput/samples_per_second": rate,
            "throughput/data_wait_fraction": min(1.0, self._waited / trained),
        }
        self._rates.append(rate)
        self._started, self._samples, self._paused, self._waited = now, 0, 0.0, 0.0
        return tags

    @property
    def median(self) -> float | None:
        rates = self._rates[1:] or self._rates
        return statistics.median(rates) if rates else None

    @property
    def latest(self) -> float | None:
        if self._samples and not self._rates:
            return self._samples / max(time.perf_counter() - self._started - self._paused, 1e-9)
        return self._rates[-1] if self._rates else None
