"""`launch -m` and `launch plan -m`: run or plan a sweep. Imports Optuna."""

from __future__ import annotations

import json
from collections.abc import Callable

from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.planning import print_nodes, two_columns
from launcher.cli.requests import request_of
from launcher.cli.sweep_display import SweepDisplay, conclusion
from launcher.errors import Stopped
from launcher.planning.nodes import NodePlan
from launcher.sweeps import api as sweeps


def train(line: Line, result: Callable[[str], None]) -> int:
    """Run a sweep, print its directory and return its exit status."""
    with SweepDisplay() as display:
        try:
            outcome = sweeps.run(request_of(line), display)
        except Stopped:
            if display.directory is not None and display.directory.exists():
                result(str(display.directory.path))
            raise
    if not display.finished:
        for text in conclusion(outcome):
            say(text)
    result(str(outcome.directory.path))
    return sweeps.exit_status(outcome)


def plan(line: Line, result: Callable[[str], None]) -> int:
    """Print what a sweep would do, and the plan of its first trial."""
    with SweepDisplay() as display:
        planned = sweeps.plan(request_of(line), display, ask="offline" not in line.flags)
    if "json" in line.flags:
        result(json.dumps(sweeps.describe(*planned), indent=2))
        return 0
    result(two_columns(sweeps.lines(*planned)))
    if isinstance(planned[1], NodePlan):
        print_nodes(planned[1], f"{planned[0].directory.path}/0", result)
    return 0
