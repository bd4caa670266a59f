"""Run and plan sweeps, for the command line, the Python API and Hydra's plugin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.clusters.base import kind_of
from launcher.config.overrides import masked
from launcher.jobs.prepare import Prepared, Request
from launcher.jobs.remote.location import is_remote
from launcher.jobs.training import checked_host_plan, checked_node_plan, ended_by_signals, exit_status_of
from launcher.planning.hosts import HostPlan
from launcher.planning.nodes import NodePlan
from launcher.sweeps import remote, syntax
from launcher.sweeps.algorithms import name_of
from launcher.sweeps.driver import Driver
from launcher.sweeps.observer import SweepObserver, SweepOutcome
from launcher.sweeps.planning import SweepPlan, check_trials, plan_sweep
from launcher.sweeps.plugin import sweeper
from launcher.sweeps.search import grid
from launcher.sweeps.specification import SweepSpec, read_sweep


def run(request: Request, observer: SweepObserver) -> SweepOutcome:
    """Run a sweep until it is complete or is stopped.

    Raises:
        RequestError: the request is invalid; nothing was started.
        Stopped: a second signal stopped it immediately.
    """
    with ended_by_signals():
        spec = read_sweep(request)
        if is_remote(spec.cluster):
            return remote.run(spec, observer)
        outcome: SweepOutcome = sweeper(plan_sweep(spec, observer), observer).sweep(list(request.words))
        return outcome


def drive(sweep_plan: SweepPlan, observer: SweepObserver) -> SweepOutcome:
    """Run a planned sweep. Hydra's sweeper calls it; it raises the same errors as `run`."""
    return Driver(sweep_plan, observer).run()


def plan(
    request: Request, observer: SweepObserver, ask: bool = True
) -> tuple[SweepSpec, SweepPlan | HostPlan | NodePlan]:
    """Plan a sweep without creating anything.

    Args:
        ask: query Azure's public price list.

    Returns:
        The sweep, and its plan; for other machines the plan of its first trial.

    Raises:
        RequestError: the request is invalid.
    """
    spec = read_sweep(request)
    if spec.cluster.size is None and not kind_of(spec.cluster).names_hosts:
        return spec, plan_sweep(spec, observer)
    check_trials(spec)
    if spec.cluster.size is None:
        return spec, checked_host_plan(spec.first.job, observer)
    return spec, checked_node_plan(Prepared(spec.first, spec.directory), observer, ask)


def exit_status(outcome: SweepOutcome) -> int:
    """Return 130 or 143 if a signal stopped the sweep, 1 if it failed, else 0.

    With `sweep.exit=any_failed` a failed trial is also 1.
    """
    status = outcome.result.get("status")
    if status == "stopped" and outcome.signal_number is not None:
        return exit_status_of(outcome.signal_number)
    if outcome.exit_rule == "any_failed" and (outcome.result.get("trials") or {}).get("failed"):
        return 1
    return 1 if status == "failed" else 0


def describe(spec: SweepSpec, sweep_plan: SweepPlan | HostPlan | NodePlan, most: int = 200) -> dict[str, Any]:
    """Return the content of `launch plan -m --json`: the sweep, its first trials, the plan of the first trial."""
    found: dict[str, Any] = {
        "sweep": spec.directory.name,
        "directory": str(spec.directory.path),
        "sampler": name_of(spec.settings.sampler),
        "pruner": name_of(spec.settings.pruner),
        "objectives": {objective.tag: objective.direction for objective in spec.objectives},
        "trials": spec.total,
        "concurrency": sweep_plan.concurrency if isinstance(sweep_plan, SweepPlan) else None,
        "keys": spec.space.keys,
        "over": list(spec.space.over),
        "warm_start": None if spec.warm_start is None else spec.warm_start.name,
        "plan": (sweep_plan.plan if isinstance(sweep_plan, SweepPlan) else sweep_plan).to_dict(),
    }
    if spec.settings.sampler == "grid":
        found["grid"] = [
            [masked(word) for word in spec.space.overrides(values)]
            for values in itertools.islice(grid(spec.space), most)
        ]
    return found


def lines(spec: SweepSpec, sweep_plan: SweepPlan | HostPlan | NodePlan) -> list[tuple[str, str]]:
    """Return the plan of a sweep as (label, value) for the terminal, without the tables of a plan for VMs."""
    facts = describe(spec, sweep_plan)
    summary = sweep_plan.headline().text if isinstance(sweep_plan, SweepPlan) else spec.summary()
    rows = [("sweep", facts["directory"]), ("trials", summary)]
    rows += [(f"trial {number}", " ".join(words)) for number, words in enumerate(facts.get("grid", ()))]
    if "grid" in facts and len(facts["grid"]) < spec.total:
        rows.append(("", f"and {spec.total - len(facts['grid'])} more"))
    rows.append(("the first trial", ""))
    if isinstance(sweep_plan, SweepPlan):
        return [*rows, *sweep_plan.plan.lines()]
    return [*rows, *sweep_plan.lines()] if isinstance(sweep_plan, HostPlan) else rows


def as_words(params: Mapping[str, Any]) -> list[str]:
    """Return `hydra.sweeper.params` as words of the command line."""
    return syntax.words_of(params)


def as_request(
    words: tuple[str, ...], trials: int | None, config_dir: Path | None, note: Callable[[str], None]
) -> Request:
    """Return the request of `launcher.sweep`."""
    given = [*words, f"sweep.trials={trials}"] if trials is not None else list(words)
    return Request(given, config_dir, note=note)
