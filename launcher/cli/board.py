"""`launch board`: serves TensorBoard over the run root, at an address that shows the losses first."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from launcher.cli import board_server
from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.run_files import configuration_of
from launcher.cli.runs import run_root
from launcher.errors import ConfigError, RunError
from launcher.runs import RunDirectory, list_runs, mirror

_PINNED = ("train/loss", "val/loss")
_MOST_MONITORED = 4  # pinned cards fill the first screen
_NEWEST = 20  # the configurations of so many runs are read


def board(line: Line) -> int:
    """Run `launch board`: serve TensorBoard over the run root until Ctrl-C."""
    root = run_root(line)
    port, host = line.flags.get("port", "6006"), line.flags.get("host", "127.0.0.1")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535, such as 6006.", key="--port")
    if not root.is_dir():
        raise RunError(f"There is no run root {root} yet. Train a job first, or choose another: run.root=DIRECTORY.")
    displayed = RunDirectory(root / "run").root
    prefix = f"/{secrets.token_urlsafe(16)}"
    url_host = f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{port}{prefix}/{page(pinned_tags(root))}"
    say(f"TensorBoard for {displayed}: {url} (stop it with Ctrl-C)")
    options = ["--logdir", str(root), "--host", host, "--port", port, "--reload_multifile=true", "--reload_interval=5"]
    opening = [board_server.OPEN, url] if "open" in line.flags else []
    # `-P`: files of the calling directory are not imported in place of modules.
    command = [sys.executable, "-P", board_server.__file__, *opening, *options, f"--path_prefix={prefix}"]
    if displayed != str(root):
        return mirror.board(root, command, say)
    # Replace this process, so that Ctrl-C reaches TensorBoard directly.
    os.execv(sys.executable, command)


def page(tags: list[str]) -> str:
    """Return the end of the address of the Time Series tab with the charts of these tags at its top."""
    cards = [{"plugin": "scalars", "tag": tag} for tag in tags]
    return f"?pinnedCards={quote(json.dumps(cards, separators=(',', ':')), safe='')}#timeseries"


def pinned_tags(root: Path) -> list[str]:
    """Return the tags to show first: the losses, and what the newest runs of the run root monitor."""
    monitored = list(dict.fromkeys(tag for tag in _monitored(root) if tag not in _PINNED))
    return [*_PINNED, *monitored[:_MOST_MONITORED]]


def _monitored(root: Path) -> Iterator[str]:
    """Yield the monitored tags of the newest runs and sweeps, the newest first."""
    for run in [*list_runs(root)][: -_NEWEST - 1 : -1]:
        with suppress(RunError):  # a damaged run must not hide the others
            tag = (run.result().get("best") or {}).get("tag") or configuration_of(run).get("checkpoint.monitor")
            if isinstance(tag, str):
                yield tag
