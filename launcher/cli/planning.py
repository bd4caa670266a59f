"""Plan: what training would do, on this machine, on VMs, as a sweep. Nothing is created."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.cli import batch
from launcher.cli.output import results_alone

if TYPE_CHECKING:
    from launcher.cli.line import Line
    from launcher.jobs.prepare import Prepared
    from launcher.planning.hosts import HostPlan
    from launcher.planning.nodes import NodePlan
    from launcher.planning.plan import Plan


def _plan_of_sweep(line: Line) -> int:
    from launcher.cli.sweep_display import SweepDisplay
    from launcher.planning.nodes import NodePlan
    from launcher.sweeps import api as sweeps

    with results_alone() as result:
        with SweepDisplay() as display:
            planned = sweeps.plan(line.request(), display, ask="offline" not in line.flags)
        if "json" in line.flags:
            result(json.dumps(sweeps.describe(*planned), indent=2))
            return 0
        rows = sweeps.lines(*planned)
        width = max(len(what) for what, _ in rows)
        result("\n".join(f"{what:<{width}}  {value}".rstrip() for what, value in rows))
        if isinstance(planned[1], NodePlan):
            _show_nodes(planned[1], f"{planned[0].directory.path}/0", result)
        return 0


def plan(line: Line) -> int:
    if "multirun" in line.flags and not batch.is_meant(line):
        return _plan_of_sweep(line)
    from launcher.cli.display import Shown
    from launcher.cli.terminal import Display
    from launcher.clusters.base import kind_of
    from launcher.jobs.prepare import prepare
    from launcher.jobs.training import checked_host_plan, checked_plan
    from launcher.jobs.weights import weights_of

    with results_alone() as result:
        if batch.is_meant(line):
            return batch.plan(line, result)
        prepared = prepare(line.request())
        if prepared.job.cluster.size is not None:
            return _plan_of_nodes(line, prepared, result)
        with Display() as display:
            plan: Plan | HostPlan
            if kind_of(prepared.job.cluster).names_hosts:
                plan = checked_host_plan(prepared.job, Shown(display))
            else:
                weights = None if prepared.resumes else weights_of(prepared.job)
                plan = checked_plan(prepared.job, Shown(display), weights=weights)
        if "json" in line.flags:
            facts = {"run": prepared.directory.name, "directory": prepared.directory.told()}
            result(json.dumps({**facts, **plan.to_dict()}, indent=2))
            return 0
        rows = [("run", prepared.directory.told()), *plan.lines()]
        width = max(len(what) for what, _ in rows)
        result("\n".join(f"{what:<{width}}  {value}" for what, value in rows))
    return 0


def _plan_of_nodes(line: Line, prepared: Prepared, result: Callable[[str], None]) -> int:
    from launcher.cli.display import Shown
    from launcher.cli.terminal import Display
    from launcher.jobs.training import checked_node_plan

    with Display() as display:
        plan = checked_node_plan(prepared, Shown(display), ask="offline" not in line.flags)
    path = str(prepared.directory.path)
    if "json" in line.flags:
        result(json.dumps({"run": prepared.directory.name, "directory": path, **plan.to_dict()}, indent=2))
    else:
        _show_nodes(plan, path, result)
    return 0


def _show_nodes(plan: NodePlan, path: str, result: Callable[[str], None]) -> None:
    from launcher.planning.tables import text

    result(text(plan, path, width=shutil.get_terminal_size((120, 24)).columns))
