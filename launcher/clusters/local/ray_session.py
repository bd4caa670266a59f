"""Keeps a Ray for the next commands (`cluster.keep_minutes`).

    with lease(minutes=10) as kept:      # None: it is in use, and the command starts a Ray of its own
        ...                              # kept.address, kept.token

A user has at most one session, in a directory that only this user can enter (`runtime_directory`): `session.json` has
the address of Ray, its token, and the fingerprint of the command that started it; the command that uses the session
locks `lease`. A separate program, the keeper, owns Ray. It stops Ray when the lease was free for the given number of
minutes, and on SIGTERM (`launch down`). If the keeper is killed, the reaper (reaper.py) stops Ray. The lock of a
command that is killed is released by the system.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters import reaper
from launcher.runs.plain_files import replace_text

if TYPE_CHECKING:
    from launcher.clusters.local.embedded_ray import EmbeddedRay

START_SECONDS = 60.0
LOOK_SECONDS = 0.5
# Environment variables that differ between commands and have no effect on workers.
_IGNORED = {
    *("_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLUMNS", "LINES", "WINDOWID", "PS1", "PROMPT_COMMAND", "COLORTERM"),
    *("PYTEST_CURRENT_TEST", "TERM_SESSION_ID", "SSH_TTY", "SSH_CONNECTION", "SSH_CLIENT", "INVOCATION_ID"),
}


@dataclass(frozen=True)
class RaySession:
    """A kept Ray.

    Attributes:
        address: HOST:PORT of its GCS.
        token: the token that gives access to it.
        made_for: `fingerprint` of the command that started it.
        keeper, started: process id and start time (clock ticks) of the keeper.
        marker: NAME=value in the environment of Ray's processes.
        cpus, gpus: its resources.
        since: wall-clock time of its start.
    """

    address: str
    token: str
    made_for: str
    keeper: int
    started: str
    marker: str
    cpus: float
    gpus: float
    since: float

    def alive(self) -> bool:
        """Return whether its keeper is running, and therefore Ray as well."""
        with contextlib.suppress(OSError, IndexError):
            fields = reaper._stat(self.keeper)
            return fields[0] != "Z" and fields[19] == self.started
        return False


def fingerprint() -> str:
    """Return a hash of versions, interpreter, directory and environment. A command reuses a Ray with the same hash.

    Ray's workers inherit the environment and the directory from the command that started Ray.
    """
    versions = [importlib.metadata.version(name) for name in ("ray", "torch")]
    code = Path(__file__).resolve().parents[2]
    environment = sorted((name, value) for name, value in os.environ.items() if name not in _IGNORED)
    facts = [sys.version, sys.executable, str(code), os.getcwd(), *versions, environment]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def runtime_directory() -> Path | None:
    """Return this user's private directory for sockets and sessions, creating it; None if that is impossible."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(given) / "launch" if given else Path(tempfile.gettempdir()) / f"launch-of-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError:
        return None
    # Another user may have created it first, to read its files.
    safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if safe else None


def current() -> RaySession | None:
    """Return the current session, in use or idle; None if there is none."""
    directory = runtime_directory()
    if directory is None:
        return None
    try:
        kept = RaySession(**json.loads((directory / "session.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return kept if kept.alive() else None


def in_use() -> bool:
    """Return whether a command uses the session."""
    directory = runtime_directory()
    if directory is None or not (directory / "lease").exists():
        return False
    with (directory / "lease").open("rb") as file:
        return not _locked(file.fileno())


def idle_minutes() -> float:
    """Return the number of idle minutes after which the session ends."""
    directory = runtime_directory()
    with contextlib.suppress(OSError, ValueError):
        return float((directory / "lease").read_text()) if directory is not None else 0.0
    return 0.0


@contextlib.contextmanager
def lease(minutes: float) -> Iterator[RaySession | None]:
    """Lock the kept Ray for the block, and yield it. It is started if there is none, or if its fingerprint differs.

    Yields None if another command uses it, or if there is no private directory.

    Args:
        minutes: the idle minutes after the block until the Ray is stopped.
    """
    directory = runtime_directory()
    if directory is None:
        yield None
        return
    with os.fdopen(os.open(directory / "lease", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        if not _locked(file.fileno()):
            yield None
            return
        file.truncate()
        file.write(f"{minutes:g}")
        file.flush()
        kept = current()
        if kept is not None and kept.made_for != fingerprint():
            end(kept)
            kept = None
        yield kept or _start(directory)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _start(directory: Path) -> RaySession | None:
    """Start a keeper and wait until its Ray runs; return None on failure."""
    (directory / "session.json").unlink(missing_ok=True)
    code = Path(__file__).resolve().parents[3]
    # `-P` and an explicit path: a file of the calling directory must not shadow a module of launch.
    program = f"import sys; sys.path.append({str(code)!r}); from {__name__} import keeper; keeper()"
    with (directory / "keeper.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and a closed terminal must not kill it
        )
    latest = time.monotonic() + START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < latest:
            if (kept := current()) is not None and kept.keeper == process.pid:
                return kept
            time.sleep(0.02)
    except BaseException:  # Ctrl-C
        process.terminate()
        raise
    process.terminate()
    return None


def end(kept: RaySession) -> bool:
    """Stop a kept Ray and the work on it. Return whether none of its processes is left."""
    with contextlib.suppress(OSError):
        if kept.alive():
            os.kill(kept.keeper, signal.SIGTERM)
    latest = time.monotonic() + 10
    while kept.alive() and time.monotonic() < latest:
        time.sleep(0.02)
    if kept.alive():
        with contextlib.suppress(OSError):
            os.kill(kept.keeper, signal.SIGKILL)
    return reaper.end(kept.marker, grace=0.3)


# ---- the keeper -----------------------------------------------------------------------------------------------------


def keeper() -> None:
    """Run a Ray until it was idle for the given minutes. This is the main function of the keeper's process."""
    from launcher.clusters.local.embedded_ray import EmbeddedRay

    directory = runtime_directory()
    assert directory is not None
    made_for = fingerprint()
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    with EmbeddedRay() as cluster:
        kept = RaySession(
            address=cluster.address,
            token=cluster.token,
            made_for=made_for,
            keeper=os.getpid(),
            started=reaper._stat(os.getpid())[19],
            marker=cluster.marker,
            cpus=cluster.available[0],
            gpus=cluster.available[1],
            since=time.time(),
        )
        replace_text(directory / "session.json", json.dumps(asdict(kept)), permissions=0o600)
        try:
            _wait(cluster, signals)
        finally:
            if current() == kept:
                (directory / "session.json").unlink(missing_ok=True)


def _wait(cluster: EmbeddedRay, signals: list[int]) -> None:
    """Return on a signal, when a process of Ray has died, or when the session was idle for long enough."""
    last_used = time.monotonic()
    while not signals and cluster.dead_process() is None:
        if in_use():
            last_used = time.monotonic()
        elif time.monotonic() - last_used > 60 * idle_minutes():
            return
        time.sleep(LOOK_SECONDS)
