"""What is sent of a project to other machines: the files of a directory that git tracks or would, without secrets."""

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
HOME = Path(__file__).resolve().parents[3]  # where launch itself lies
OWN = ("launcher", "models", "conf")
_NAMED = 6
_RUNS = "runs/"  # in a calling directory; a package of that name elsewhere is a package


@dataclass(frozen=True)
class Selection:
    """The files of a directory, relative to it, that are sent to other machines, and those that are withheld.

    secrets: withheld because they look like secrets. ignored: how many more `.launchignore` withholds.
    """

    files: list[str]
    secrets: list[str]
    ignored: int = 0

    def withheld(self) -> str:
        """Return a sentence that names what is not sent; empty where everything is."""
        parts = []
        if self.secrets:
            more = f" and {len(self.secrets) - _NAMED} more" if len(self.secrets) > _NAMED else ""
            names = ", ".join(name if name.isprintable() else ascii(name) for name in self.secrets[:_NAMED])
            parts.append(f"{names}{more} (may hold secrets; to send a file, write !FILE in {IGNORE_FILE})")
        if self.ignored:
            parts.append(f"{count(self.ignored, 'file')} named by {IGNORE_FILE}")
        return f"Not sent: {', and '.join(parts)}." if parts else ""


def select(directory: Path) -> Selection:
    """Return what is sent of a directory: the files that git tracks or would, else all but the usual rest.

    Files that git ignores, links that lead out of the directory, what a run or an environment leaves, and secrets
    (`launcher.runs.secret_files`) are not sent.
    """
    words = [*GIT, "-C", str(directory), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=60)
        listed = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    found = sorted(set(listed)) if listed is not None else _walked(directory)
    wanted = [name for name in found if name and not name.startswith(_RUNS) and not _NEVER & set(name.split("/"))]
    rules = SecretFiles(directory)
    chosen = [name for name in wanted if _is_file(directory, name)]
    stay = [name for name in chosen if rules.withholds(name)]
    secrets = [name for name in stay if not rules.ignores(name)]
    gone = set(stay)
    return Selection([name for name in chosen if name not in gone], secrets, len(stay) - len(secrets))


def own_files() -> list[str]:
    """Return launch's own files, relative to `HOME`."""
    found = (f"{part}/{name}" for part in OWN for name in _walked(HOME / part))
    return [name for name in found if not is_secret_path(name)]


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
