"""Stop every process that has a marker in its environment, and remove one directory.

The driver of an embedded Ray starts this file as a separate program. When the driver exits, for whatever reason, the
program stops all processes that the driver started; Ray's agents would otherwise run for another minute. The program
imports only the standard library, so that it starts in milliseconds and works even if the environment is broken.

    python -I -S reaper.py MARKER DIRECTORY DRIVER_PID      (standard input: a pipe that the driver holds open)
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

GRACE_SECONDS = 1.0  # between SIGTERM and SIGKILL; enough for multiprocessing to release its shared memory
LIMIT_SECONDS = 30.0


def marked(marker: str) -> dict[int, str]:
    """Return the processes with the entry `marker` ("NAME=value") in their environment, and their descendants.

    Returns:
        A mapping from process id to the start time of the process in clock ticks, which distinguishes the process from
        a later one with the same id.
    """
    entry = marker.encode()
    parents: dict[int, int] = {}
    started: dict[int, str] = {}
    found: set[int] = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        pid = int(name)
        # A process may exit while it is examined, and processes of other users cannot be read: skip both.
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = _stat(pid)
            if fields[0] == "Z":
                continue
            parents[pid], started[pid] = int(fields[1]), fields[19]
            if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    # Children of a marked process are included, even if they were started with a different environment.
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: started[pid] for pid in found - {os.getpid()}}


def end(marker: str, grace: float = GRACE_SECONDS) -> bool:
    """Stop every process with `marker`: SIGTERM, then SIGKILL after `grace` seconds. Return whether none is left."""
    begun = time.monotonic()
    while left := marked(marker):
        elapsed = time.monotonic() - begun
        if elapsed > LIMIT_SECONDS:
            return False
        for pid, started in left.items():
            with contextlib.suppress(OSError, IndexError):
                if _stat(pid)[19] == started:
                    os.kill(pid, signal.SIGTERM if elapsed < grace else signal.SIGKILL)
        time.sleep(0.05)
    return True


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat, starting with the state. The command name before it may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _wait_for_exit(driver: int) -> None:
    """Wait until the driver closes its end of standard input or exits (a forked child may keep the pipe open)."""
    waited: list[int] = [sys.stdin.fileno()]
    with contextlib.suppress(OSError):
        waited.append(os.pidfd_open(driver))
    if os.getppid() == driver:
        select.select(waited, [], [])


def main() -> None:
    marker, directory, driver = sys.argv[1], sys.argv[2], int(sys.argv[3])
    _wait_for_exit(driver)
    end(marker)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
