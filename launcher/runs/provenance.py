"""Where a run comes from: user, versions, and the state of the calling repository."""

from __future__ import annotations

import getpass
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.runs.masked_patch import mask_patch
from launcher.runs.secret_files import is_secret_path

_PACKAGES = ("launch-train", "torch", "ray", "hydra-core", "tensorboard")
# A diff longer than this is data, not code. Without the programs that a repository's own configuration may
# name for looking at it.
GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_LARGEST_PATCH = 2 * 2**20


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user id
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the run depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git(directory: Path) -> dict[str, Any] | None:
    """Return commit and branch of the repository around `directory`, and whether it has uncommitted changes."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {
        "commit": commit.strip(),
        "branch": (_git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool((_git(directory, "status", "--porcelain", "--untracked-files=no") or "").strip()),
    }


def patch(directory: Path) -> str:
    """Return the uncommitted changes of the repository around `directory`; empty without any, or without one."""
    changed = (_git(directory, "diff", "HEAD", "--name-only", "-z") or "").split("\0")
    secret = [f":(top,exclude,literal){name}" for name in changed if name and is_secret_path(name)]
    only = ["--", ":(top)", *secret] if secret else []
    text = _git(directory, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", *only) or ""
    if len(text) > _LARGEST_PATCH:
        text = text[:_LARGEST_PATCH].rpartition("\n")[0] + "\n# cut here: longer than 2 MiB\n"
    return mask_patch(text) if text else ""


def _git(directory: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            [*GIT, "-C", str(directory), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a repository on a dead network drive
        return None
    return done.stdout if done.returncode == 0 else None
