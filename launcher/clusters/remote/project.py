"""Selects the files of a project that are sent to other machines: what git tracks or would track, without secrets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.formatting import count
from launcher.runs.provenance import GIT
from launcher.runs.secret_files import IGNORE_FILE, SecretFiles, is_secret_path

_NEVER = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
HOME = Path(__file__).resolve().parents[3]  # the directory that contains launch
OWN = ("launcher", "models", "conf")
_NAMED = 6
_RUNS = "runs/"  # only at the top of the directory: deeper, it may be a package


@dataclass(frozen=True)
class Selection:
    """The files of a directory that are sent to other machines, and those that are withheld.

    Attributes:
        files: the files to send, relative to the directory.
        secrets: files that are withheld because they look like secrets.
        ignored: the number of files that `.launchignore` withholds.
    """

    files: list[str]
    secrets: list[str]
    ignored: int = 0

    def withheld(self) -> str:
        """Return a sentence that names the files that are not sent; empty if there are none."""
        parts = []
        if self.secrets:
            more = f" and {len(self.secrets) - _NAMED} more" if len(self.secrets) > _NAMED else ""
            names = ", ".join(name if name.isprintable() else ascii(name) for name in self.secrets[:_NAMED])
            parts.append(f"{names}{more} (may contain secrets; to send a file, write !FILE in {IGNORE_FILE})")
        if self.ignored:
            parts.append(f"{count(self.ignored, 'file')} named by {IGNORE_FILE}")
        return f"Not sent: {', and '.join(parts)}." if parts else ""


def select(directory: Path) -> Selection:
    """Return the files of a directory to send: those that git tracks or would track; without git, all files.

    Not sent are files that git ignores, links to a place outside of the directory, runs, virtual environments, caches,
    and secrets (`launcher.runs.secret_files`).
    """
    words = [*GIT, "-C", str(directory), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=60)
        listed = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    found = sorted(set(listed)) if listed is not None else _walked(directory)
    names = [name for name in found if name and not name.startswith(_RUNS) and not _NEVER & set(name.split("/"))]
    rules = SecretFiles(directory)
    candidates = [name for name in names if _is_file(directory, name)]
    withheld = [name for name in candidates if rules.withholds(name)]
    secrets = [name for name in withheld if not rules.ignores(name)]
    excluded = set(withheld)
    return Selection([name for name in candidates if name not in excluded], secrets, len(withheld) - len(secrets))


def own_files() -> list[str]:
    """Return launch's own files, relative to `HOME`."""
    found = (f"{part}/{name}" for part in OWN for name in _walked(HOME / part))
    return [name for name in found if not is_secret_path(name)]


def size(directory: Path, names: Sequence[str]) -> int:
    """Return the total size of these files in bytes."""
    return sum((directory / name).stat().st_size for name in names)


def _walked(directory: Path) -> list[str]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in _NEVER and not (Path(folder) / name).is_symlink())
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def _is_file(directory: Path, name: str) -> bool:
    path = directory / name
    return path.is_file() and path.resolve().is_relative_to(directory.resolve())
