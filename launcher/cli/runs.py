"""`launch runs`, `logs` and `stop`: list, follow and stop runs."""

from __future__ import annotations

import json
from pathlib import Path

from launcher import runs as run_roots
from launcher.cli import batch, listing
from launcher.cli.filters import take_filter
from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.requests import request_of
from launcher.cli.terminal import Display
from launcher.clusters.base import WaitingRun
from launcher.clusters.remote.ray_jobs import own_token
from launcher.config.overrides import masked
from launcher.errors import ConfigError
from launcher.jobs.prepare import key_of, root_of, run_section
from launcher.jobs.remote import control
from launcher.jobs.remote.location import confirm, why_not_confirmed
from launcher.jobs.remote.states import Waiting
from launcher.runs import RunDirectory
from launcher.terminal_text import printable

ADDRESS = "cluster.address"


def runs(line: Line) -> int:
    """Run `launch runs`."""
    chosen, line.words = take_filter(line.words)
    root = run_root(line)
    rows = chosen.apply(listing.rows(root), root)
    if "json" in line.flags:
        print(json.dumps(listing.strict_json(rows), indent=2))
    else:
        listing.print_table(rows, root, chosen.columns)
    return 0


def logs(line: Line) -> int:
    """Run `launch logs`: print the log of a run, and follow it while the run is active."""
    assert line.name is not None
    until_the_end = "no_follow" not in line.flags
    if until_the_end and (waiting := _waiting(line)) is not None:
        try:
            waiting.await_start(say)
        except KeyboardInterrupt:
            say(f"Detached. {line.name} continues to wait.")
            return 0
    run = run_roots.find(run_root(line), line.name)
    sent = run.sent
    if sent is None:
        listing.follow(run, until_the_end)
        return 0
    _confirm_address(line, sent)
    if run.log.exists() and (why := why_not_confirmed(sent)):
        say(why)
        listing.follow(run, until_the_end=False)
        return 0
    with control.copied(sent, say) as copies:
        is_active = Waiting(sent, say)
        try:
            with Display() as display:
                control.until_it_begins(sent, display.show, copies, is_active)
            listing.follow(run, until_the_end, is_active, copies.try_fetch if copies is not None else lambda: None)
        except KeyboardInterrupt:
            say(f"Detached. {run.name} continues to run.")
    return 0


def stop(line: Line) -> int:
    """Run `launch stop`: print the directory of the run."""
    assert line.name is not None
    if (waiting := _waiting(line)) is not None:
        say(waiting.cancel())
        print(printable(RunDirectory(run_root(line) / line.name).display_path()))
        return 0
    run = run_roots.find(run_root(line), line.name)
    sent = run.sent
    if sent is None:
        say(listing.stop(run))
    else:
        _confirm_address(line, sent)
        say(control.stop(run) if sent == run else control.stop_trial(run, sent, listing.stop))
    print(printable(run.display_path()))
    return 0


def run_root(line: Line) -> Path:
    """Return the run root for a verb that composes no job.

    Raises:
        ConfigError: a word sets a key that has no effect on the verb.
    """
    accepted = ("run.root", ADDRESS) if line.verb in ("logs", "stop") else ("run.root",)
    for word in line.words:
        if key_of(word) not in accepted:
            raise ConfigError(
                f'"{masked(word)}" has no effect on launch {line.verb}, which accepts run.root=DIRECTORY. '
                "Leave it out.",
                key=masked(word),
            )
    return root_of(run_section(request_of(line)).root)


def _waiting(line: Line) -> WaitingRun | None:
    """Return the run of a command line if it waits in a scheduler."""
    assert line.name is not None
    return batch.waiting(RunDirectory(run_root(line) / line.name))


def _confirm_address(line: Line, sent: RunDirectory) -> None:
    """Record the cluster of a remote run if the command line contains its address."""
    for word in line.words:
        key, _, address = word.partition("=")
        if key == ADDRESS:
            confirm(sent, address, own_token())
