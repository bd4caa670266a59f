"""Sweeps: Hydra's syntax, Optuna's search, warm groups of workers.

    syntax      words -> axes                    space       axes -> Optuna's distributions, sampler, pruner
    planning    what a sweep will do             study       the journal: ask, report, tell
    plugin      Hydra makes the sweeper          driver      the loop
    records     trials.csv, best.yaml, log.txt
    show        the terminal                     report      report.html

Importing this package imports nothing else: the parts are looked up when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.prepare import Request
    from launcher.sweeps.observer import SweepObserver, SweepOutcome
    from launcher.sweeps.planning import Planned


def run(request: Request, observer: SweepObserver) -> SweepOutcome:
    """Run the sweep that the words ask for, to its end or until somebody stops it.

    Raises:
        RequestError: it cannot be done as asked; nothing was started.
        Stopped: it was ended at once by a signal.
    """
    from launcher.jobs import ended_by_signals
    from launcher.sweeps.plugin import sweeper

    with ended_by_signals():
        outcome: SweepOutcome = sweeper(plan(request, observer), observer).sweep(list(request.words))
        return outcome


def drive(planned: Planned, observer: SweepObserver) -> SweepOutcome:
    """Run a sweep that is planned; what Hydra's sweeper does when it is called. Raises as `run`."""
    from launcher.sweeps.driver import Driver

    return Driver(planned, observer).run()


def plan(request: Request, observer: SweepObserver) -> Planned:
    """Work out what `run` would do, and create nothing. Raises RequestError."""
    from launcher.sweeps.planning import plan_sweep

    return plan_sweep(request, observer)


def exit_status(outcome: SweepOutcome) -> int:
    """Return 0 where trials were completed, 1 where the sweep failed, 130 or 143 where a signal stopped it."""
    from launcher.jobs import exit_status_of

    status = outcome.result.get("status")
    if status == "stopped" and outcome.signal_number is not None:
        return exit_status_of(outcome.signal_number)
    return 1 if status == "failed" else 0


def describe(planned: Planned, most: int = 200) -> dict[str, Any]:
    """Return what `launch plan -m` prints: the sweep, its first trials' words, and the plan of the first trial."""
    import itertools

    from launcher.sweeps.space import grid
    from launcher.words import shown

    found: dict[str, Any] = {
        "sweep": planned.directory.name,
        "directory": str(planned.directory.path),
        "sampler": planned.settings.sampler,
        "pruner": planned.settings.pruner,
        "objectives": {objective.tag: objective.direction for objective in planned.objectives},
        "trials": planned.total,
        "concurrency": planned.concurrency,
        "keys": [axis.key for axis in planned.words.axes],
        "plan": planned.plan.to_dict(),
    }
    if planned.settings.sampler == "grid":
        found["grid"] = [
            [shown(word) for word in planned.words.overrides(values)]
            for values in itertools.islice(grid(planned.words), most)
        ]
    return found


def lines(planned: Planned) -> list[tuple[str, str]]:
    """Return the plan of a sweep as (what, value) for people."""
    from pathlib import Path

    about = describe(planned)
    rows = [("sweep", str(Path(about["directory"]))), ("trials", planned.headline())]
    rows += [(f"trial {number}", " ".join(words)) for number, words in enumerate(about.get("grid", ()))]
    if len(about.get("grid", ())) < planned.total and "grid" in about:
        rows.append(("", f"and {planned.total - len(about['grid'])} more"))
    return [*rows, ("the first trial", ""), *planned.plan.lines()]


def as_words(params: Mapping[str, Any]) -> list[str]:
    """Return `hydra.sweeper.params` as words of the command line."""
    from launcher.sweeps.syntax import words_of

    return words_of(params)


def as_request(words: tuple[str, ...], trials: int | None, config_dir: Path | None) -> Request:
    """Return the request of the Python API."""
    from launcher.prepare import Request

    return Request([*words, f"sweep.trials={trials}"] if trials is not None else list(words), config_dir)
