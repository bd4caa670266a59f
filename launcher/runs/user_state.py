"""The user's state directory, $XDG_STATE_HOME/launch (~/.local/state/launch), and its record of the user's runs.

    save(run, cluster={"kind": "ssh", …}, place={"job": …})      # by the command that starts or sends the run
    lookup(run)                                                  # RunRecord, or None for a run of another user

A run's directory is untrusted and may name any cluster. The state directory belongs to the user (mode 0700), and the
record is keyed by the absolute path of the run, so a copy of the run at another path has none. Clusters and addresses
in a run's directory are used only if this record agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.config import authority
from launcher.errors import RunError
from launcher.runs.directory import RunDirectory
from launcher.runs.plain_files import replace_text


@dataclass(frozen=True)
class RunRecord:
    """What the user's own commands recorded about one run or one sweep.

    Attributes:
        run: its key, see `key_of`.
        cluster: the section `cluster` that it was started with, as plain data; empty where none was recorded.
        words: of a sweep, the words that only its user may set; None for a run.
        config_dir: of a sweep, the configuration directory that it was started with.
        place: content of remote.json if the run was sent to a cluster, else None.
        token: fingerprint of the token with which it was sent, see `fingerprint`.
        time: of the last change, in seconds since 1970.
    """

    run: str
    cluster: dict[str, Any] = field(default_factory=dict)
    words: list[str] | None = None
    config_dir: str | None = None
    place: dict[str, Any] | None = None
    token: str | None = None
    time: float = 0.0


def directory() -> Path:
    """Return the state directory, whether or not it exists."""
    given = os.environ.get("XDG_STATE_HOME")
    base = Path(given) if given and Path(given).is_absolute() else Path.home() / ".local" / "state"
    return base / "launch"


def write_private(path: Path, text: str) -> None:
    """Write a file of the state directory as a whole, readable for this user alone.

    Raises:
        OSError: the directory cannot be created or written.
    """
    for folder in (directory(), path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:  # created by another program, with another umask
            folder.chmod(0o700)
    replace_text(path, text, permissions=0o600)


def key_of(run: RunDirectory) -> str:
    """Return the absolute path of a run, the links among its parents resolved."""
    return str(run.path.expanduser().absolute().parent.resolve() / run.name)


def fingerprint(token: str) -> str:
    """Return what recognises a token and does not reveal it."""
    return hashlib.sha256(b"launch token\0" + token.encode()).hexdigest()


def save(run: RunDirectory, **changes: Any) -> RunRecord:
    """Record fields of `RunRecord` for a run; the others keep their values.

    Raises:
        RunError: the state directory cannot be written.
    """
    earlier = lookup(run) or RunRecord(key_of(run))
    record = RunRecord(**{**asdict(earlier), **changes, "time": time.time()})
    path = _path(record.run)
    try:
        write_private(path, json.dumps(asdict(record), indent=2) + "\n")
    except OSError as error:
        raise RunError(
            f'The cluster of the run "{run.name}" could not be recorded in {path.parent} ({error.strerror}), and '
            "`launch logs` and `launch stop` trust no other place. Make the directory writable, or set XDG_STATE_HOME."
        ) from None
    return record


def record_cluster(run: RunDirectory, cluster: dict[str, Any]) -> None:
    """Record the cluster of a run that is driven on this machine, where a file could not decide it.

    Raises:
        RunError: the state directory cannot be written.
    """
    if authority.claims(cluster, None):
        save(run, cluster=cluster, place=None, token=None)
    else:
        forget(run)


def lookup(run: RunDirectory) -> RunRecord | None:
    """Return what this user's commands recorded about a run; None where they recorded nothing."""
    key = key_of(run)
    record = _read(_path(key))
    return record if record is not None and record.run == key else None


def records() -> list[RunRecord]:
    """Return what this user's commands recorded about all runs."""
    found = [_read(path) for path in sorted((directory() / "runs").glob("*.json"))]
    return [record for record in found if record is not None]


def _read(path: Path) -> RunRecord | None:
    try:
        content = json.loads(path.read_text())
        known = {each.name for each in fields(RunRecord)}
        record = RunRecord(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    valid = isinstance(record.run, str) and isinstance(record.cluster, dict) and isinstance(record.words, list | None)
    return record if valid and isinstance(record.place, dict | None) else None


def cluster_of(run: RunDirectory) -> dict[str, Any]:
    """Return the section `cluster` that the user chose for a run, or for the sweep whose trial it is; else nothing."""
    for one in (run, RunDirectory(run.path.parent)):
        record = lookup(one)
        if record is not None and record.cluster:
            return record.cluster
    return {}


def forget(run: RunDirectory) -> None:
    """Remove the record of a run; nothing happens where there is none."""
    with suppress(OSError):
        _path(key_of(run)).unlink()


def _path(key: str) -> Path:
    return directory() / "runs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
