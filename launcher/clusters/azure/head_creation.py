"""The head of a cluster comes by Ray's own `ray up`; what refuses it is told in Azure's words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from launcher.clusters.azure import failures, local_files
from launcher.clusters.azure.spec import ClusterSpec
from launcher.errors import MachineError
from launcher.ray_seam.settings import COMMAND

_TOOLS_SECONDS = 10.0  # that ssh and rsync of an interrupted `ray up` have to end


class NoCapacity(MachineError):
    """Azure has none of what was asked; the next alternative may be had."""


def ray_up(wish: ClusterSpec, file: Path) -> None:
    """Run `ray up`, which makes the head. What it says goes to a file.

    Raises:
        NoCapacity, MachineError: it failed, and why.
    """
    log, refused = local_files.file_of(wish.name, "log"), local_files.file_of(wish.name, "failures")
    refused.unlink(missing_ok=True)
    words = [sys.executable, "-P", *COMMAND, "up", str(file), "--yes", "--no-config-cache"]
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        "RAY_UP_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        failures.VARIABLE: str(refused),
    }
    with log.open("wb") as sink:
        status = _whole(words, environment, sink)
    if status == 0:
        return
    for line in refused.read_text().splitlines() if refused.exists() else ():
        failure = failures.LaunchFailure(**json.loads(line))
        kind = NoCapacity if failure.code in failures.CAPACITY else MachineError
        raise kind(f"Azure did not create the head of {wish.name} ({wish.place}). {failure.words}")
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise MachineError(f"`ray up` of {wish.name} failed: {' '.join(said[-4:])[-500:]} All of it is in {log}.")


def _whole(words: Sequence[str], environment: dict[str, str], sink: IO[bytes]) -> int:
    """Run a command with all that it starts, and return its status; where this is interrupted, all of that ends too.

    In a session of its own: a Ctrl-C on the terminal would reach Ray first, which would go on with the next step.
    """
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        for number, seconds in ((signal.SIGTERM, _TOOLS_SECONDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        raise
