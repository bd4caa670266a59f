"""A Ray that outlives its command for some minutes, for the next command (`cluster.keep_minutes`).

    with lease(minutes=10) as kept:      # None: it cannot be had now, and the command starts a Ray of its own
        ...                              # kept.address, kept.token

One session a user, in a directory that only that user can enter (`runtime_directory`): `session.json` says where Ray
listens, with which token, and what it was made for; `lease` is locked by the command that uses it. A program of its
own, the keeper, owns Ray. It ends it when nobody has held the lease for so many minutes, when it is told to (SIGTERM,
`launch down`), and the reaper (reaper.py) does when the keeper is killed. A command that is killed lets go of the lease
with its last breath, since locks end with their process. So nothing stays longer than was asked.
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

from launcher.clusters import reaper
from launcher.runs.plain_files import replace_text

START_SECONDS = 60.0
LOOK_SECONDS = 0.5
# Variables that differ from command to command and mean nothing to a worker.
_PASSING = {
    *("_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLUMNS", "LINES", "WINDOWID", "PS1", "PROMPT_COMMAND", "COLORTERM"),
    *("PYTEST_CURRENT_TEST", "TERM_SESSION_ID", "SSH_TTY", "SSH_CONNECTION", "SSH_CLIENT", "INVOCATION_ID"),
}


@dataclass(frozen=True)
class RaySession:
    """A Ray that is kept.

    Attributes:
        address: HOST:PORT of its GCS.
        token: who has it may use this Ray.
        made_for: `fingerprint` of the command that started it.
        keeper, started: process and start time (clock ticks) of the keeper.
        marker: NAME=value in the environment of Ray's processes.
        cpus, gpus: what it has.
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
        """Whether its keeper lives: then Ray does, too."""
        with contextlib.suppress(OSError, IndexError):
            fields = reaper._stat(self.keeper)
            return fields[0] != "Z" and fields[19] == self.started
        return False


def fingerprint() -> str:
    """Return what must be alike for a Ray to be used again: versions, interpreter, directory and environment.

    Ray's workers inherit environment and directory from the command that started it.
    """
    versions = [importlib.metadata.version(name) for name in ("ray", "torch")]
    code = Path(__file__).resolve().parents[2]
    environment = sorted((name, value) for name, value in os.environ.items() if name not in _PASSING)
    facts = [sys.version, sys.executable, str(code), os.getcwd(), *versions, environment]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def runtime_directory() -> Path | None:
    """Return the directory for what is known to this user alone, made if need be; None where there can be none."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(given) / "launch" if given else Path(tempfile.gettempdir()) / f"launch-of-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError:
        return None
    # Somebody else may have made it first, to read what we write there.
    safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if safe else None


def current() -> RaySession | None:
    """Return the session that is kept now, in use or not."""
    directory = runtime_directory()
    if directory is None:
        return None
    try:
        kept = RaySession(**json.loads((directory / "session.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return kept if kept.alive() else None


def in_use() -> bool:
    """Whether a command uses the session."""
    directory = runtime_directory()
    if directory is None or not (directory / "lease").exists():
        return False
    with (directory / "lease").open("rb") as file:
        return not _locked(file.fileno())


def idle_minutes() -> float:
    """After how many idle minutes the session ends."""
    directory = runtime_directory()
    with contextlib.suppress(OSError, ValueError):
        return float((directory / "lease").read_text()) if directory is not None else 0.0
    return 0.0


@contextlib.contextmanager
def lease(minutes: float) -> Iterator[RaySession | None]:
    """Hold the kept Ray for the length of the block; start it where there is none, or none that fits.

    Yields None where it cannot be had: another command uses it, or there is no private directory.

    Args:
        minutes: how long it is kept after the block, unless another command asks for it.
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
    """Start a keeper and wait until its Ray is there; None where that fails."""
    (directory / "session.json").unlink(missing_ok=True)
    code = Path(__file__).resolve().parents[3]
    # `-P` and the path by hand: a file of the calling directory must not be taken for a module of ours.
    program = f"import sys; sys.path.append({str(code)!r}); from {__name__} import keeper; keeper()"
    with (directory / "keeper.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # neither Ctrl-C nor a closed terminal ends it
        )
    latest = time.monotonic() + START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < latest:
            if (kept := current()) is not None and kept.keeper == process.pid:
                return kept
            time.sleep(0.02)
    except BaseException:  # Ctrl-C: nobody will come for this Ray
        process.terminate()
        raise
    process.terminate()
    return None


def end(kept: RaySession) -> bool:
    """End a kept Ray now, with whatever runs on it. Returns whether nothing of it is left."""
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
    """Own a Ray until nobody has wanted it for some minutes. The main function of a process of its own."""
    from launcher.clusters.local.embedded_ray import EmbeddedRay

    directory = runtime_directory()
    assert directory is not None
    made_for = fingerprint()
    told_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told_to_end.append(number))
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
            _wait(directory, cluster, told_to_end)
        finally:
            if current() == kept:
                (directory / "session.json").unlink(missing_ok=True)


def _wait(directory: Path, cluster: object, told_to_end: list[int]) -> None:
    """Return when the session is to end: told, broken, or idle for as long as its last user said."""
    last_used = time.monotonic()
    while not told_to_end and cluster.dead_process() is None:  # type: ignore[attr-defined]
        if in_use():
            last_used = time.monotonic()
        elif time.monotonic() - last_used > 60 * idle_minutes():
            return
        time.sleep(LOOK_SECONDS)
