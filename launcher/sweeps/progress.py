"""The files and the display of a running sweep: trials.csv, best.yaml and result.json after each change."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from launcher.money import Meter
from launcher.sweeps import records
from launcher.sweeps.observer import SweepObserver
from launcher.sweeps.planning import SweepPlan
from launcher.sweeps.study import Study


class SweepProgress:
    """Writes the state of a sweep to its files, and passes it to the observer.

    Args:
        meter: counts the costs of the sweep.
        began: time at which this driver started.
        seconds_before: duration of the earlier drivers of a resumed sweep.

    Attributes:
        running: numbers of the trials that workers run; a live view of those of the driver.
        held: number of the trial that was sampled and waits for workers, or None.
        durations: duration of each trial that ended since this driver started.
    """

    def __init__(
        self,
        sweep_plan: SweepPlan,
        study: Study,
        observer: SweepObserver,
        meter: Meter,
        began: float,
        seconds_before: float,
    ) -> None:
        self._sweep_plan, self._spec, self._study, self._observer = sweep_plan, sweep_plan.spec, study, observer
        self._meter, self._began, self._seconds_before = meter, began, seconds_before
        self._table = records.Table(study)
        self.running: Collection[int] = ()
        self.held: int | None = None
        self.durations: list[float] = []

    def left(self) -> int:
        """Return the number of trials that have not ended."""
        return max(0, self._spec.total - sum(trial.state.is_finished() for trial in self._study.frozen()))

    def rows(self) -> list[dict[str, Any]]:
        """Return the current table (see `records.Table.rows`)."""
        held = set() if self.held is None else {self.held}
        begun = {trial.number for trial in self._study.frozen() if trial.state.name == "RUNNING"}
        return self._table.rows(frozenset(begun - set(self.running) - held), self.held)

    def changed(self) -> None:
        """Update trials.csv, best.yaml and result.json, and notify the observer."""
        rows = self.rows()
        with suppress(OSError):  # a full disk must not end running trials; a resume uses only the journal
            records.write_csv(self._spec.directory.path / "trials.csv", rows, self._spec.space)
            records.write_best(self._spec.directory, self._study)
            self._write(rows, {"status": "running"})
        self._show(rows)

    def show(self) -> None:
        """Notify the observer."""
        self._show(self.rows())

    def write(self, **changes: Any) -> None:
        """Write the result.json of the sweep."""
        self._write(self.rows(), changes)

    def _show(self, rows: list[dict[str, Any]]) -> None:
        best = self._study.best()
        facts = {"best": None if best is None else best.number, "seconds_left": self._seconds_left()}
        self._observer.changed(rows, facts)

    def _seconds_left(self) -> float | None:
        if not self.durations:
            return None
        each, left = sum(self.durations) / len(self.durations), self.left()
        return each * left / max(1, min(self._sweep_plan.concurrency, left))

    def _write(self, rows: list[dict[str, Any]], changes: Mapping[str, Any]) -> None:
        best = self._study.best()
        repeats = None if best is None else self._study.repeats_of(best.number)
        now = time.time()
        usd = self._meter.usd(now)
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["state"]] = counts.get(row["state"], 0) + 1
        content: dict[str, Any] = {
            "reason": None,
            "error": None,
            "steps": sum(trial.user_attrs.get("steps") or 0 for trial in self._study.frozen()),
            "workers": self._sweep_plan.plan.machines.workers,
            "seconds": round(self._seconds_before + now - self._began, 3),
            "cost_usd": None if usd is None else round(usd, 6),
            "trials": {"total": self._spec.total, **counts},
            "metrics": {},
            "best": None
            if best is None
            else {
                "tag": self._spec.objectives[0].tag,
                "value": best.values[0],
                "step": best.user_attrs.get("steps"),
                "trial": best.number,
                **({} if repeats is None else repeats.to_dict()),
            },
        }
        self._spec.directory.update_result(**{**content, **changes})
