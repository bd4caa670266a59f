"""Machines: what can be rented, what is there, and its end."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from launcher.cli.output import say
from launcher.errors import ConfigError
from launcher.terminal_text import printable

if TYPE_CHECKING:
    from launcher.cli.line import Line
    from launcher.clusters.remote.registry import Head


def sizes(line: Line) -> int:
    from launcher.cli import sizes

    if line.words:
        raise ConfigError(
            f'launch sizes takes no overrides, but found "{line.words[0]}". --region NAME chooses a region.'
        )
    region = line.flags.get("region", sizes.REGION)
    if not region.isalnum():
        raise ConfigError(f"--region {region}: the name of an Azure region is letters and digits, such as eastus.")
    found, source = sizes.known(region.lower(), ask="offline" not in line.flags)
    if "json" in line.flags:
        say(source)
        print(json.dumps(sizes.rows(found, region.lower()), indent=2))
    else:
        sizes.table(found, region.lower(), source)
    return 0


def up(line: Line) -> int:
    from launcher.cli import machines
    from launcher.jobs import prepare
    from launcher.jobs.training import ended_by_signals

    if line.name is not None:
        raise ConfigError(f"launch up takes the name of a cluster as cluster.name={line.name}.")
    cluster = prepare.composed(line.request()).job.cluster
    with ended_by_signals():  # SIGTERM like Ctrl-C: what was begun is ended here, and told
        head = machines.up(cluster, say)
    words = f"cluster={head.kind}" + (f" cluster.name={head.name}" if head.name != head.kind else "")
    say(f"The cluster {head.name} is up, and launch … {words} trains on it. SSH to its head: {shlex.join(head.ssh)}")
    print(head.name)
    return 0


def status(line: Line) -> int:
    from launcher.cli import machines

    _no_words(line)
    clusters = machines.status(line.name)
    print(json.dumps(clusters, indent=2) if "json" in line.flags else printable(machines.told(clusters)))
    return 0


def down(line: Line) -> int:
    from launcher.cli import machines

    _no_words(line)
    if "force" in line.flags and "save" in line.flags:
        raise ConfigError("--force ends runs without saving them, and --save saves them first: choose one.")

    def before(head: Head) -> None:
        from launcher.jobs.remote.active_jobs import release  # with Ray's client

        if "force" not in line.flags:
            release(head, say, save="save" in line.flags)

    machines.down(line.name, say, before, forget="forget" in line.flags)
    return 0


def _no_words(line: Line) -> None:
    from launcher.config.overrides import masked

    if line.words:
        raise ConfigError(f'"{masked(line.words[0])}" means nothing to launch {line.verb}. Leave it out.')
