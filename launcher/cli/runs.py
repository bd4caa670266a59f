"""Runs that are there: list, follow, stop, show in TensorBoard."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli import board_server
from launcher.cli.output import say
from launcher.errors import ConfigError, RunError
from launcher.runs import RunDirectory
from launcher.terminal_text import printable

if TYPE_CHECKING:
    from launcher.cli.line import Line

ADDRESS = "cluster.address"


def _root(line: Line) -> Path:
    """Return the run root for a verb that composes no job; other words than `run.root` would mean nothing to it."""
    from launcher.config.overrides import masked
    from launcher.jobs.prepare import key_of, root_of, run_section

    taken = ("run.root", ADDRESS) if line.verb in ("logs", "stop") else ("run.root",)
    for word in line.words:
        if key_of(word) not in taken:
            raise ConfigError(f'"{masked(word)}" means nothing to launch {line.verb}; it takes run.root=DIRECTORY.')
    return root_of(run_section(line.request()).root)


def _confirm_address(line: Line, sent: RunDirectory) -> None:
    """Record the cluster of a run that was sent where the command line names its address."""
    for word in line.words:
        key, _, address = word.partition("=")
        if key == ADDRESS:
            from launcher.clusters.remote.ray_jobs import own_token
            from launcher.jobs.remote.location import confirm

            confirm(sent, address, own_token())


def runs(line: Line) -> int:
    from launcher.cli.listing import rows, strict_json, table

    root = _root(line)
    found = rows(root)
    if "json" in line.flags:
        print(json.dumps(strict_json(found), indent=2))
    else:
        table(found, root)
    return 0


def logs(line: Line) -> int:
    from launcher import runs
    from launcher.cli.listing import follow

    assert line.name is not None
    run = runs.find(_root(line), line.name)
    until_the_end = "no_follow" not in line.flags
    sent = run.sent
    if sent is None:
        follow(run, until_the_end)
        return 0
    from launcher.cli.terminal import Display
    from launcher.jobs.remote import control
    from launcher.jobs.remote.location import why_not_confirmed
    from launcher.jobs.remote.states import Waiting

    _confirm_address(line, sent)
    if run.log.exists() and (why := why_not_confirmed(sent)):
        say(why)
        follow(run, until_the_end=False)
        return 0
    with control.copied(sent, say) as copies:
        still = Waiting(sent, say)
        try:
            with Display() as display:
                control.until_it_begins(sent, display.show, copies, still)
            follow(run, until_the_end, still, copies.try_fetch if copies is not None else lambda: None)
        except KeyboardInterrupt:
            say(f"{run.name} goes on without this command.")
    return 0


def stop(line: Line) -> int:
    from launcher import runs
    from launcher.cli.listing import stop

    assert line.name is not None
    run = runs.find(_root(line), line.name)
    sent = run.sent
    if sent is None:
        say(stop(run))
    else:
        from launcher.jobs.remote import control

        _confirm_address(line, sent)
        say(control.stop(run) if sent == run else control.stop_trial(run, sent, stop))
    print(printable(run.told()))
    return 0


def board(line: Line) -> int:
    root = _root(line)
    port, host = line.flags.get("port", "6006"), line.flags.get("host", "127.0.0.1")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535, such as 6006.")
    if not root.is_dir():
        raise RunError(f"There is no run root {root} yet. Train something first, or name another: run.root=DIRECTORY.")
    shown = RunDirectory(root / "run").root
    prefix = f"/{secrets.token_urlsafe(16)}"
    own = f"[{host}]" if ":" in host else host
    url = f"http://{own}:{port}{prefix}/"
    say(f"TensorBoard over {shown}: {url} (Ctrl-C ends it)")
    options = ["--logdir", str(root), "--host", host, "--port", port, "--reload_multifile=true", "--reload_interval=5"]
    opening = [board_server.OPEN, url] if "open" in line.flags else []
    # `-P`: no file of the calling directory takes the place of a module.
    command = [sys.executable, "-P", board_server.__file__, *opening, *options, f"--path_prefix={prefix}"]
    if shown != str(root):
        from launcher.runs.mirror import board

        return board(root, command, say)
    # One process less, and Ctrl-C reaches TensorBoard itself.
    os.execv(sys.executable, command)
