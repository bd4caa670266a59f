"""Create the head of a cluster with `ray up`, and report a failure with Azure's own error."""

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

_TOOLS_SECONDS = 10.0  # for ssh and rsync of an interrupted `ray up` to exit


class NoCapacity(MachineError):
    """Azure has no capacity for the requested VMs; the next alternative may have some."""


def ray_up(spec: ClusterSpec, file: Path) -> None:
    """Run `ray up`, which creates the head. Its output is written to a file.

    Args:
        file: the configuration file for `ray up`; see `ray_yaml`.

    Raises:
        NoCapacity: Azure has no capacity for the head.
        MachineError: `ray up` failed for another reason.
    """
    log, record = local_files.file_of(spec.name, "log"), local_files.file_of(spec.name, "failures")
    record.unlink(missing_ok=True)
    command = [sys.executable, "-P", *COMMAND, "up", str(file), "--yes", "--no-config-cache"]
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        "RAY_UP_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        failures.VARIABLE: str(record),
    }
    with log.open("wb") as sink:
        status = _run(command, environment, sink)
    if status == 0:
        return
    for line in record.read_text().splitlines() if record.exists() else ():
        failure = failures.LaunchFailure(**json.loads(line))
        kind = NoCapacity if failure.code in failures.CAPACITY else MachineError
        raise kind(f"Azure did not create the head of {spec.name} ({spec.place}). {failure}")
    output = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise MachineError(f"`ray up` of {spec.name} failed: {' '.join(output[-4:])[-500:]} The full log is in {log}.")


def _run(command: Sequence[str], environment: dict[str, str], sink: IO[bytes]) -> int:
    """Run a command and return its exit status. If this process is interrupted, stop all processes of the command.

    The command runs in a new session, because a Ctrl-C on the terminal would make Ray skip to its next step.
    """
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
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
