"""`launch up`: create a cluster."""

from __future__ import annotations

import shlex

from launcher.cli import machines
from launcher.cli.line import Line
from launcher.cli.open_port import confirmed
from launcher.cli.output import say
from launcher.cli.requests import request_of
from launcher.errors import ConfigError, MachineError
from launcher.jobs import prepare
from launcher.jobs.training import ended_by_signals


def up(line: Line) -> int:
    """Run `launch up`: print the name of the cluster."""
    if line.name is not None:
        raise ConfigError(f"launch up takes the name of a cluster as cluster.name={line.name}.", key="cluster.name")
    line.words = confirmed(line.words)
    cluster = prepare.composed(request_of(line)).job.cluster
    with ended_by_signals():  # SIGTERM as well as Ctrl-C: what was created is removed again, and reported
        head = machines.up(cluster, say)
    if (missing := head.missing_hosts()) and "partial" not in line.flags:
        raise MachineError(
            f"The cluster {head.name} is up without {', '.join(missing)}. Repeat `launch up` when the hosts can be "
            "used, or accept the cluster without them with --partial."
        )
    words = f"cluster={head.kind}" + (f" cluster.name={head.name}" if head.name != head.kind else "")
    say(f"The cluster {head.name} is up. Train on it with: launch {words} ... SSH to its head: {shlex.join(head.ssh)}")
    print(head.name)
    return 0
