"""Sweeps: Hydra's syntax, Optuna's search, warm groups of workers.

    syntax      words -> axes                    space       axes -> Optuna's distributions, sampler, pruner
    meaning     which sweep the words mean       planning    what it does on the machines that there are
    plugin      Hydra makes the sweeper          driver      the loop
    study       the journal: ask, report, tell   records     trials.csv, best.yaml, log.txt
    elsewhere   one that a cluster's head drives
    show        the terminal                     report      report.html

Importing this package imports nothing else: the parts are looked up when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.jobs.prepare import Request
    from launcher.planning.hosts import HostPlan
    from launcher.planning.nodes import NodePlan
    from launcher.sweeps.meaning import Meant
    from launcher.sweeps.observer import SweepObserver, SweepOutcome
    from launcher.sweeps.planning import Planned


def run(request: Request, observer: SweepObserver) -> SweepOutcome:
    """Run the sweep that the words ask for, to its end or until somebody stops it.

    Raises:
        RequestError: it cannot be done as asked; nothing was started.
        Stopped: it was ended at once by a signal.
    """
    from launcher.jobs.remote.location import is_remote
    from launcher.jobs.training import ended_by_signals
    from launcher.sweeps import elsewhere
    from launcher.sweeps.meaning import read_sweep
    from launcher.sweeps.planning import plan_sweep
    from launcher.sweeps.plugin import sweeper

    with ended_by_signals():
        meant = read_sweep(request)
        if is_remote(meant.cluster):
            return elsewhere.run(meant, observer)
        outcome: SweepOutcome = sweeper(plan_sweep(meant, observer), observer).sweep(list(request.words))
        return outcome


def drive(planned: Planned, observer: SweepObserver) -> SweepOutcome:
    """Run a sweep that is planned; what Hydra's sweeper does when it is called. Raises as `run`."""
    from launcher.sweeps.driver import Driver

    return Driver(planned, observer).run()


def plan(request: Request, observer: SweepObserver, ask: bool = True) -> tuple[Meant, Planned | HostPlan | NodePlan]:
    """Work out what `run` would do, and create nothing.

    Args:
        ask: Azure's public list for today's prices.

    Returns:
        The sweep, and what it does where it runs: of machines that are not here, what its first trial does.

    Raises:
        RequestError: it cannot be done as asked.
    """
    from launcher.clusters.base import kind_of
    from launcher.jobs.prepare import Prepared
    from launcher.jobs.training import checked_host_plan, checked_node_plan
    from launcher.sweeps.meaning import read_sweep
    from launcher.sweeps.planning import check_values, plan_sweep

    meant = read_sweep(request)
    if meant.cluster.size is None and not kind_of(meant.cluster).names_hosts:
        return meant, plan_sweep(meant, observer)
    check_values(meant)
    if meant.cluster.size is None:
        return meant, checked_host_plan(meant.first.job, observer)
    return meant, checked_node_plan(Prepared(meant.first, meant.directory), observer, ask)


def exit_status(outcome: SweepOutcome) -> int:
    """Return 0 where trials were completed, 1 where the sweep failed, 130 or 143 where a signal stopped it."""
    from launcher.jobs.training import exit_status_of

    status = outcome.result.get("status")
    if status == "stopped" and outcome.signal_number is not None:
        return exit_status_of(outcome.signal_number)
    return 1 if status == "failed" else 0


def describe(meant: Meant, planned: Planned | HostPlan | NodePlan, most: int = 200) -> dict[str, Any]:
    """Return what `launch plan -m` prints: the sweep, its first trials' words, and the plan of the first trial."""
    import itertools

    from launcher.config.overrides import masked
    from launcher.sweeps.planning import Planned
    from launcher.sweeps.space import grid

    found: dict[str, Any] = {
        "sweep": meant.directory.name,
        "directory": str(meant.directory.path),
        "sampler": meant.settings.sampler,
        "pruner": meant.settings.pruner,
        "objectives": {objective.tag: objective.direction for objective in meant.objectives},
        "trials": meant.total,
        "concurrency": planned.concurrency if isinstance(planned, Planned) else None,
        "keys": [axis.key for axis in meant.words.axes],
        "plan": (planned.plan if isinstance(planned, Planned) else planned).to_dict(),
    }
    if meant.settings.sampler == "grid":
        found["grid"] = [
            [masked(word) for word in meant.words.overrides(values)]
            for values in itertools.islice(grid(meant.words), most)
        ]
    return found


def lines(meant: Meant, planned: Planned | HostPlan | NodePlan) -> list[tuple[str, str]]:
    """Return the plan of a sweep as (what, value) for people; that of VMs has tables of its own."""
    from launcher.planning.hosts import HostPlan
    from launcher.sweeps.planning import Planned

    about = describe(meant, planned)
    told = planned.headline().text if isinstance(planned, Planned) else meant.told()
    rows = [("sweep", about["directory"]), ("trials", told)]
    rows += [(f"trial {number}", " ".join(words)) for number, words in enumerate(about.get("grid", ()))]
    if len(about.get("grid", ())) < meant.total and "grid" in about:
        rows.append(("", f"and {meant.total - len(about['grid'])} more"))
    rows.append(("the first trial", ""))
    if isinstance(planned, Planned):
        return [*rows, *planned.plan.lines()]
    return [*rows, *planned.lines()] if isinstance(planned, HostPlan) else rows


def as_words(params: Mapping[str, Any]) -> list[str]:
    """Return `hydra.sweeper.params` as words of the command line."""
    from launcher.sweeps.syntax import words_of

    return words_of(params)


def as_request(
    words: tuple[str, ...], trials: int | None, config_dir: Path | None, note: Callable[[str], None]
) -> Request:
    """Return the request of the Python API."""
    from launcher.jobs.prepare import Request

    given = [*words, f"sweep.trials={trials}"] if trials is not None else list(words)
    return Request(given, config_dir, note=note)
