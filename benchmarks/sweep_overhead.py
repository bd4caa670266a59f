"""Measures what the driver of a sweep costs: CPU time and memory for each trial, without training.

    python benchmarks/sweep_overhead.py                 # sweeps of 500 trials; about ten minutes; prints JSON
    python benchmarks/sweep_overhead.py --trials 50 --only grid,repeats     # a quick look

The driver composes, samples and records its trials as usual, but each trial ends at once with a made-up objective, so
that only the overhead remains. CPU time is used, because it does not depend on other work on the machine. `first` and
`last` are the first and the last fifth of the trials: a sweep whose cost grows with its trials shows a larger `last`.
`repeats` compares 27 values with three seeds each under `sweep.over` with the same 81 trials as a plain grid.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher.jobs.prepare import Request  # noqa: E402
from launcher.runners.signals import Interrupts  # noqa: E402
from launcher.runners.tasks import TaskOutcome  # noqa: E402
from launcher.runs import RunDirectory  # noqa: E402
from launcher.sweeps import driver  # noqa: E402
from launcher.sweeps.observer import SweepObserver  # noqa: E402
from launcher.sweeps.planning import plan_sweep  # noqa: E402
from launcher.sweeps.specification import read_sweep  # noqa: E402

JOB = ("experiment=mnist_tiny", "cluster=none")
EVALUATIONS = 3


class InstantRunner:
    """Runs trials that end at once, and records the CPU time and the memory of this process at each."""

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._ended: list[TaskOutcome] = []
        self.seconds: list[float] = []
        self.mib: list[float] = []

    @property
    def running(self) -> set[str]:
        return set()

    def ready(self, shape: Any) -> bool:
        return not self._ended

    def submit(self, key: str, task: Any, shape: Any) -> None:
        self.seconds.append(time.process_time())
        self.mib.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        for step in range(1, EVALUATIONS + 1):
            values = {"val/loss": (int(key) * 37 % 101) / 101 + 1 / step}
            self._on_event(key, {"kind": "progress", "step": step, "values": values})
        facts = {"status": "completed", "steps": EVALUATIONS, "seconds": 1.0}
        RunDirectory(Path(task.directory)).update_result(metrics=values, **facts)
        self._ended.append(TaskOutcome(key, {}))

    def poll(self) -> list[TaskOutcome]:
        ended, self._ended = self._ended, []
        return ended

    def request(self, key: str, what: str) -> None:
        pass

    def release(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def run(*words: str) -> InstantRunner:
    """Run a sweep whose trials end at once."""
    found: list[InstantRunner] = []

    @contextlib.contextmanager
    def open_instant_runner(sweep_plan: Any, observer: Any, on_event: Any) -> Iterator[tuple[Any, Interrupts]]:
        with Interrupts() as interrupts:
            found.append(InstantRunner(on_event))
            yield found[0], interrupts

    original, original_poll = driver.open_runner, driver.POLL_SECONDS
    driver.open_runner, driver.POLL_SECONDS = open_instant_runner, 0.0
    try:
        with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as scratch:
            observer = SweepObserver()
            spec = read_sweep(Request([*JOB, f"run.root={scratch}", "run.name=s", *words], calling=ROOT))
            driver.Driver(plan_sweep(spec, observer), observer).run()
    finally:
        driver.open_runner, driver.POLL_SECONDS = original, original_poll
    return found[0]


def per_trial(runner: InstantRunner) -> dict[str, Any]:
    """Return the CPU time of a trial in milliseconds, and the growth of the memory, early and late in a sweep."""
    each = [1000 * (late - early) for early, late in zip(runner.seconds, runner.seconds[1:], strict=False)]
    part = max(1, len(runner.seconds) // 5)
    return {
        "trials": len(runner.seconds),
        "first_ms": round(statistics.median(each[:part]), 1),
        "last_ms": round(statistics.median(each[-part:]), 1),
        "mib_after_first": round(runner.mib[part], 1),
        "mib_at_end": round(runner.mib[-1], 1),
        "total_seconds": round(runner.seconds[-1] - runner.seconds[0], 2),
    }


def rates(count: int) -> str:
    return ",".join(f"{1e-4 * 1000 ** (index / max(1, count - 1)):.4g}" for index in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--only", help="sweeps to measure, such as grid,repeats")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    asked = parser.parse_args()
    os.chdir(ROOT)
    grid = f"optimizer.lr={rates(asked.trials)}"
    searched = ("optimizer.lr=tag(log,interval(1e-4,1e-1))", f"sweep.trials={asked.trials}")
    sweeps = {
        "grid": (grid,),
        "keep_best": (grid, "sweep.keep=best"),
        "random_asha": ("sweep=random", "sweep.pruner=asha", *searched),
        "tpe": ("sweep=tpe", *searched),
    }
    only = asked.only.split(",") if asked.only else [*sweeps, "repeats"]
    run(f"optimizer.lr={rates(5)}")  # imports
    result: dict[str, Any] = {"benchmark": "sweep_overhead"}
    result |= {name: per_trial(run(*words)) for name, words in sweeps.items() if name in only}
    if "repeats" in only:
        seeds = (f"optimizer.lr={rates(min(27, asked.trials))}", "trainer.seed=range(3)")
        plain, repeated = per_trial(run(*seeds)), per_trial(run(*seeds, "sweep.over=trainer.seed"))
        ratio = repeated["total_seconds"] / plain["total_seconds"]
        result["repeats"] = {"grid": plain, "over": repeated, "ratio": round(ratio, 3)}
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
