"""`launch status` and `launch down`: list and stop clusters."""

from __future__ import annotations

import json

from launcher.cli import machines
from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.clusters.remote.registry import Head
from launcher.config.overrides import masked
from launcher.errors import ConfigError
from launcher.terminal_text import printable


def status(line: Line) -> int:
    """Run `launch status`."""
    _accept_no_words(line)
    clusters = machines.status(line.name)
    print(json.dumps(clusters, indent=2) if "json" in line.flags else printable(machines.table(clusters)))
    return 0


def down(line: Line) -> int:
    """Run `launch down`."""
    _accept_no_words(line)
    if "force" in line.flags and "save" in line.flags:
        raise ConfigError("--force stops runs without saving them, and --save saves them first. Choose one.")

    def before(head: Head) -> None:
        from launcher.jobs.remote.active_jobs import release  # imports Ray's client

        if "force" not in line.flags:
            release(head, say, save="save" in line.flags)

    machines.down(line.name, say, before, forget="forget" in line.flags)
    return 0


def _accept_no_words(line: Line) -> None:
    if line.words:
        raise ConfigError(
            f'"{masked(line.words[0])}" has no effect on launch {line.verb}. Leave it out.', key=masked(line.words[0])
        )
