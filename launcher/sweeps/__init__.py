"""Sweeps: Hydra's syntax, Optuna's search, warm groups of workers.

    syntax         words -> axes                    search    axes -> Optuna's distributions, sampler, pruner
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
    from launcher.sweeps.observer import SweepObserver, SweepOutcome
    from launcher.sweeps.planning import SweepPlan
    from launcher.sweeps.specification import SweepSpec


def run(request: Request, observer: SweepObserver) -> SweepOutcome:
    """Run the sweep that the words ask for, to its end or until somebody stops it.

    Raises:
        RequestError: it cannot be done as asked; nothing was started.
        Stopped: it was ended at once by a signal.
    """
    from launcher.jobs.remote.location import is_remote
    from launcher.jobs.training import ended_by_signals
    from launcher.sweeps import remote
    from launcher.sweeps.planning import plan_sweep
    from launcher.sweeps.plugin import sweeper
    from launcher.sweeps.specification import read_sweep

    with ended_by_signals():
        spec = read_sweep(request)
        if is_remote(spec.cluster):
            return remote.run(spec, observer)
        outcome: SweepOutcome = sweeper(plan_sweep(spec, observer), observer).sweep(list(request.words))
        return outcome


def drive(sweep_plan: SweepPlan, observer: SweepObserver) -> SweepOutcome:
    """Run a sweep that is sweep_plan; what Hydra's sweeper does when it is called. Raises as `run`."""
    from launcher.sweeps.driver import Driver

    return Driver(sweep_plan, observer).run()


def plan(
    request: Request, observer: SweepObserver, ask: bool = True
) -> tuple[SweepSpec, SweepPlan | HostPlan | NodePlan]:
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
    from launcher.sweeps.planning import check_values, plan_sweep
    from launcher.sweeps.specification import read_sweep

    spec = read_sweep(request)
    if spec.cluster.size is None and not kind_of(spec.cluster).names_hosts:
        return spec, plan_sweep(spec, observer)
    check_values(spec)
    if spec.cluster.size is None:
        return spec, checked_host_plan(spec.first.job, observer)
    return spec, checked_node_plan(Prepared(spec.first, spec.directory), observer, ask)


def exit_status(outcome: SweepOutcome) -> int:
    """Return 0 where trials were completed, 1 where the sweep failed, 130 or 143 where a signal stopped it."""
    from launcher.jobs.training import exit_status_of

    status = outcome.result.get("status")
    if status == "stopped" and outcome.signal_number is not None:
        return exit_status_of(outcome.signal_number)
    return 1 if status == "failed" else 0


def describe(spec: SweepSpec, sweep_plan: SweepPlan | HostPlan | NodePlan, most: int = 200) -> dict[str, Any]:
    """Return what `launch plan -m` prints: the sweep, its first trials' words, and the plan of the first trial."""
    import itertools

    from launcher.config.overrides import masked
    from launcher.sweeps.planning import SweepPlan
    from launcher.sweeps.search import grid

    found: dict[str, Any] = {
        "sweep": spec.directory.name,
        "directory": str(spec.directory.path),
        "sampler": spec.settings.sampler,
        "pruner": spec.settings.pruner,
        "objectives": {objective.tag: objective.direction for objective in spec.objectives},
        "trials": spec.total,
        "concurrency": sweep_plan.concurrency if isinstance(sweep_plan, SweepPlan) else None,
        "keys": [axis.key for axis in spec.space.axes],
        "plan": (sweep_plan.plan if isinstance(sweep_plan, SweepPlan) else sweep_plan).to_dict(),
    }
    if spec.settings.sampler == "grid":
        found["grid"] = [
            [masked(word) for word in spec.space.overrides(values)]
            for values in itertools.islice(grid(spec.space), most)
        ]
    return found


def lines(spec: SweepSpec, sweep_plan: SweepPlan | HostPlan | NodePlan) -> list[tuple[str, str]]:
    """Return the plan of a sweep as (what, value) for people; that of VMs has tables of its own."""
    from launcher.planning.hosts import HostPlan
    from launcher.sweeps.planning import SweepPlan

    about = describe(spec, sweep_plan)
    told = sweep_plan.headline().text if isinstance(sweep_plan, SweepPlan) else spec.told()
    rows = [("sweep", about["directory"]), ("trials", told)]
    rows += [(f"trial {number}", " ".join(words)) for number, words in enumerate(about.get("grid", ()))]
    if len(about.get("grid", ())) < spec.total and "grid" in about:
        rows.append(("", f"and {spec.total - len(about['grid'])} more"))
    rows.append(("the first trial", ""))
    if isinstance(sweep_plan, SweepPlan):
        return [*rows, *sweep_plan.plan.lines()]
    return [*rows, *sweep_plan.lines()] if isinstance(sweep_plan, HostPlan) else rows


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
