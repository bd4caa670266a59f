"""What is sent of a project to other machines: the files of a directory that git does not ignore."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

_NEVER = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
HOME = Path(__file__).resolve().parents[2]  # where launch itself lies
OWN = ("launcher", "models", "conf")
_RUNS = "runs/"  # in a calling directory; a package of that name elsewhere is a package


def files(directory: Path) -> list[str]:
    """Return the files below a directory, relative to it: those that git tracks or would, else all but the usual rest.

    Files that git ignores, links that lead out of the directory, and what a run or an environment leaves are not among
    them.
    """
    words = ["git", "-C", str(directory), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=60)
        listed = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    found = sorted(set(listed)) if listed is not None else _walked(directory)
    wanted = [name for name in found if name and not name.startswith(_RUNS) and not _NEVER & set(name.split("/"))]
    return [name for name in wanted if _is_file(directory, name)]


def own_files() -> list[str]:
    """Return launch's own files, relative to `HOME`."""
    return [f"{part}/{name}" for part in OWN for name in _walked(HOME / part)]


def size(directory: Path, names: Sequence[str]) -> int:
    """Return the bytes of these files."""
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
