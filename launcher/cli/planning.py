"""`launch plan`: what training would do, on this machine, on SSH hosts or on VMs. Nothing is created."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from launcher.cli import batch
from launcher.cli.display import RunDisplay
from launcher.cli.line import Line
from launcher.cli.output import results_only
from launcher.cli.requests import request_of
from launcher.cli.terminal import Display
from launcher.clusters.base import kind_of
from launcher.jobs.prepare import Prepared, prepare
from launcher.jobs.training import checked_host_plan, checked_node_plan, checked_plan
from launcher.jobs.weights import weights_of
from launcher.planning.hosts import HostPlan
from launcher.planning.nodes import NodePlan
from launcher.planning.plan import Plan
from launcher.planning.tables import text


def plan(line: Line) -> int:
    """Run `launch plan`."""
    with results_only() as result:
        if batch.uses_scheduler(line):
            return batch.plan(line, result)
        if "multirun" in line.flags:
            from launcher.cli import sweeping  # imports Optuna

            return sweeping.plan(line, result)
        prepared = prepare(request_of(line))
        if prepared.job.cluster.size is not None:
            return _plan_nodes(line, prepared, result)
        with Display() as display:
            plan: Plan | HostPlan
            if kind_of(prepared.job.cluster).names_hosts:
                plan = checked_host_plan(prepared.job, RunDisplay(display))
            else:
                weights = None if prepared.resumes else weights_of(prepared.job)
                plan = checked_plan(prepared.job, RunDisplay(display), weights=weights)
        if "json" in line.flags:
            facts = {"run": prepared.directory.name, "directory": prepared.directory.display_path()}
            result(json.dumps({**facts, **plan.to_dict()}, indent=2))
        else:
            result(two_columns([("run", prepared.directory.display_path()), *plan.lines()]))
    return 0


def two_columns(rows: list[tuple[str, str]]) -> str:
    """Return rows of (label, value) as aligned text."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


def print_nodes(plan: NodePlan, path: str, result: Callable[[str], None]) -> None:
    """Print a plan for VMs, whose run would be written to `path`, as tables as wide as the terminal."""
    result(text(plan, path, width=shutil.get_terminal_size((120, 24)).columns))


def _plan_nodes(line: Line, prepared: Prepared, result: Callable[[str], None]) -> int:
    with Display() as display:
        plan = checked_node_plan(prepared, RunDisplay(display), ask="offline" not in line.flags)
    path = str(prepared.directory.path)
    if "json" in line.flags:
        result(json.dumps({"run": prepared.directory.name, "directory": path, **plan.to_dict()}, indent=2))
    else:
        print_nodes(plan, path, result)
    return 0
