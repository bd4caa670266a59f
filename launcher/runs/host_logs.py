"""The logs of a run whose machines share no disk: `log.txt` of rank 0's machine, `log-HOST.txt` of every other machine.

Each file only grows, also if rank 0 moves to another machine. A machine that becomes rank 0's continues `log.txt` from
the store. A machine that is no longer rank 0's moves its unsent lines to its own `log-HOST.txt`.
"""

from __future__ import annotations

import re
from itertools import takewhile

from launcher.runs.mirror import Mirrored

_LOG = "log.txt"


def log_of_host(host: str) -> str:
    """Return the name of a machine's own log."""
    return f"log-{re.sub(r'[^A-Za-z0-9.-]', '-', host)}.txt"


def take_over(mirrored: Mirrored, name: str) -> None:
    """Make this machine, which runs rank 0, the writer of the run. Other ranks of this machine must not write yet.

    Args:
        name: of this machine's own log.

    Raises:
        StorageError: the store cannot be read or written.
    """
    unsent = _unsent_lines(mirrored)
    if not mirrored.pull():
        return
    mirrored.claim()
    if unsent:
        _write(mirrored, name, _continued(mirrored, name) + unsent)
        mirrored.push([name])


def take_up_log(mirrored: Mirrored, name: str) -> None:
    """Prepare the log of a machine that is not rank 0's; see `take_over`."""
    unsent = _unsent_lines(mirrored)
    _write(mirrored, name, _continued(mirrored, name) + unsent)
    (mirrored.run.path / _LOG).unlink(missing_ok=True)


def _unsent_lines(mirrored: Mirrored) -> bytes:
    """Return the lines of the local log.txt that the store lacks, if the store has the lines before them."""
    here = _here(mirrored, _LOG)
    if not here:
        return b""
    stored = _stored(mirrored, _LOG)
    ours = here.splitlines(keepends=True)
    pairs = zip(ours, stored.splitlines(keepends=True), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return b"".join(ours[common:]) if common else b""  # nothing in common: the log of an earlier run of this name


def _continued(mirrored: Mirrored, name: str) -> bytes:
    """Return the local log if it continues the store's, else the store's."""
    here, stored = _here(mirrored, name), _stored(mirrored, name)
    return here if stored and here.startswith(stored) else stored


def _here(mirrored: Mirrored, name: str) -> bytes:
    path = mirrored.run.path / name
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def _stored(mirrored: Mirrored, name: str) -> bytes:
    """Return a complete log from the store; empty if there is none."""
    path = mirrored.run.path / f".{name}.stored.tmp"
    try:
        mirrored.store.get(name, path)
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    finally:
        path.unlink(missing_ok=True)


def _write(mirrored: Mirrored, name: str, content: bytes) -> None:
    path = mirrored.run.path / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
