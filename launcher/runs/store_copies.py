"""Where the copies of run roots on object stores are on this machine, and which directory is such a copy.

    $XDG_CACHE_HOME/launch/roots/<name>-<hash of the URI>/
      .store                the URI

The place of a copy follows from its URI alone. So a `.store` counts only in the directory that its URI leads to, below
this user's own cache: in any other directory it is data that may come from a stranger, and names no address.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

MARK = ".store"  # in a copy: the URI


def bases() -> list[Path]:
    """Return the directories below which this user's copies are, the preferred one first."""
    given = os.environ.get("XDG_CACHE_HOME")
    own = Path(given) / "launch" if given else Path.home() / ".cache" / "launch"
    return [own, Path(tempfile.gettempdir()) / f"launch-of-{os.getuid()}"]


def is_own(base: Path) -> bool:
    """Whether a base belongs to this user; the temporary folder is open to all. OSError where it does not exist."""
    found = base.lstat()
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode)


def copy_below(base: Path, uri: str) -> Path:
    """Return the directory of the copy of a run root."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", uri)[-60:].strip("-")
    return base / "roots" / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def is_sweep(directory: Path) -> bool:
    """Return whether a directory is a sweep; its trials are directories in it."""
    return (directory / "study.journal").is_file()


def sweep_below(uri: str) -> Path | None:
    """Return the directory of the sweep with this URI in the copy of its run root; None if this machine has none."""
    root, _, name = uri.rpartition("/")
    found = (copy_below(base, root) / name for base in bases())
    return next((path for path in found if uri_of(path.parent) == root and is_sweep(path)), None)


def uri_of(root: Path) -> str | None:
    """Return the URI of the run root that a directory is the copy of; None where it is no copy."""
    try:
        uri = (root / MARK).read_text()
        place = root.absolute().resolve()
        known = [base for base in bases() if copy_below(base, uri).resolve() == place]
        return uri if known and is_own(known[0]) else None
    except (OSError, ValueError):
        return None
