"""Ends every process that carries one marker in its environment, and removes one directory.

The driver of an embedded Ray starts this file as a small program of its own. When the driver is gone, however it went,
what it started goes as well: Ray's own agents would live on for a minute. The program imports the standard library
alone, so that it starts in milliseconds and lives when the environment around it is broken.

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

GRACE_SECONDS = 1.0  # between SIGTERM and SIGKILL: enough for multiprocessing to give back its shared memory
LIMIT_SECONDS = 30.0


def marked(marker: str) -> dict[int, str]:
    """Return the processes whose environment has the entry `marker` ("NAME=value"), with all that descend from them.

    The value is the start time of the process in clock ticks: with it, a number that was given to somebody else in the
    meantime is not taken for the process.
    """
    entry = marker.encode()
    parents: dict[int, int] = {}
    started: dict[int, str] = {}
    found: set[int] = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        pid = int(name)
        # A process may end while it is looked at, and other users' processes cannot be read: neither is ours to end.
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = _stat(pid)
            if fields[0] == "Z":
                continue
            parents[pid], started[pid] = int(fields[1]), fields[19]
            if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    # Children of a marked process are ours too, even if they were started with an environment of their own.
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: started[pid] for pid in found - {os.getpid()}}


def end(marker: str, grace: float = GRACE_SECONDS) -> bool:
    """End every process with `marker`: SIGTERM, after `grace` seconds SIGKILL. Return whether none is left."""
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
    """Return the fields of /proc/PID/stat from the state on; the command's name before it may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _wait_for_the_end_of(driver: int) -> None:
    """Wait until the driver closes its end of our standard input, or dies (a forked child of it may hold the pipe)."""
    waited: list[int] = [sys.stdin.fileno()]
    with contextlib.suppress(OSError):
        waited.append(os.pidfd_open(driver))
    if os.getppid() == driver:
        select.select(waited, [], [])


def main() -> None:
    marker, directory, driver = sys.argv[1], sys.argv[2], int(sys.argv[3])
    _wait_for_the_end_of(driver)
    end(marker)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
