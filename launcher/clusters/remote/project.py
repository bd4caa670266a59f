"""Selects the files of a project that are sent to other machines: what git tracks or would track, without secrets."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigError
from launcher.formatting import count
from launcher.runs.provenance import GIT
from launcher.runs.secret_files import IGNORE_FILE, SecretFiles, is_secret_path

_NEVER = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
_UNUSED = re.compile(r"(^|/)(node_modules|\.ipynb_checkpoints|\.DS_Store|[^/]*\.egg-info|[^/]*\.py[co])(/|$)")
HOME = Path(__file__).resolve().parents[3]  # the directory that contains launch
OWN = ("launcher", "models", "conf")
_NAMED = 6
_RUNS = "runs/"  # only at the top of the directory: deeper, it may be a package


@dataclass(frozen=True)
class Selection:
    """The files of a directory that are sent to other machines, and those that are withheld.

    Attributes:
        files: the files and links to send, relative to the directory.
        secrets: files that are withheld because they look like secrets.
        ignored: the number of files that `.launchignore` withholds.
        of_git: files and folders that git ignores.
        links: links to a place outside of the directory.
        submodules: submodules of git that are not checked out.
    """

    files: list[str]
    secrets: list[str]
    ignored: int = 0
    of_git: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    submodules: list[str] = field(default_factory=list)

    def withheld(self) -> str:
        """Return a sentence that names the files that are not sent; empty if there are none."""
        parts = []
        if self.secrets:
            parts.append(f"{_names(self.secrets)} (may contain secrets; to send a file, write !FILE in {IGNORE_FILE})")
        if self.ignored:
            parts.append(f"{count(self.ignored, 'file')} named by {IGNORE_FILE}")
        if self.links:
            parts.append(f"{_names(self.links)} (links out of the directory)")
        if self.submodules:
            parts.append(f"{_names(self.submodules)} (not checked out: git submodule update --init)")
        if self.of_git:
            parts.append(f"{_names(self.of_git)} (ignored by git)")
        return f"Not sent: {', and '.join(parts)}." if parts else ""


def check(directory: Path) -> None:
    """Raise ConfigError if a directory must not be sent: the home directory, or one that contains it."""
    path, home = directory.resolve(), Path.home().resolve()
    if path == home or path in home.parents:
        what = (
            f"{path}, which is your home directory" if path == home else f"{path}, which contains your home directory"
        )
        raise ConfigError(
            f"The calling directory is {what}, and launch sends the calling directory with all of its files to the "
            "cluster. Change to the directory of your project and repeat the command."
        )


def select(directory: Path) -> Selection:
    """Return the files of a directory to send: those that git tracks or would track; without git, all files.

    Files of submodules and of nested repositories are included, and links within the directory. Not sent are files that
    git ignores, links to a place outside of the directory, runs, virtual environments, caches, and secrets
    (`launcher.runs.secret_files`).

    Raises:
        ConfigError: the directory is the home directory, or contains it.
    """
    check(directory)
    listed, submodules = _listed(directory)
    names = [name for name in sorted(set(listed)) if not name.startswith(_RUNS) and not _NEVER & set(name.split("/"))]
    rules = SecretFiles(directory)
    candidates = [name for name in names if _is_inside(directory, name)]
    links = [name for name in names if (directory / name).is_symlink() and name not in {*candidates}]
    withheld = [name for name in candidates if rules.withholds(name)]
    secrets = [name for name in withheld if not rules.ignores(name)]
    excluded = set(withheld)
    return Selection(
        [name for name in candidates if name not in excluded],
        secrets,
        len(withheld) - len(secrets),
        [name for name in _ignored_by_git(directory) if not rules.withholds(name)],
        links,
        submodules,
    )


def own_files() -> list[str]:
    """Return launch's own files, relative to `HOME`."""
    found = (f"{part}/{name}" for part in OWN for name in _walked(HOME / part))
    return [name for name in found if not is_secret_path(name) and (HOME / name).is_file()]


def size(directory: Path, names: Sequence[str]) -> int:
    """Return the total size of these files in bytes."""
    return sum((directory / name).lstat().st_size for name in names)


def _listed(directory: Path) -> tuple[list[str], list[str]]:
    """Return the files of a directory, including those of repositories in it, and the submodules without files."""
    names = _git(directory, "--cached", "--others", "--exclude-standard")
    if names is None:
        return _walked(directory), []
    files, empty = [], []
    for name in names:
        path = directory / name
        if path.is_symlink() or not path.is_dir():
            files.append(name)
            continue
        inner, missing = _listed(path)  # a submodule or a nested repository
        files += [f"{name.rstrip('/')}/{one}" for one in inner]
        empty += [f"{name.rstrip('/')}/{one}" for one in missing] if inner else [name.rstrip("/")]
    return files, empty


def _ignored_by_git(directory: Path) -> list[str]:
    """Return the files and folders that git ignores, without those that no job needs."""
    names = _git(directory, "--others", "--ignored", "--exclude-standard", "--directory") or []
    return [
        name
        for name in sorted(names)
        if not name.startswith(_RUNS) and not _NEVER & set(name.split("/")) and not _UNUSED.search(name)
    ]


def _git(directory: Path, *options: str) -> list[str] | None:
    """Return the names that `git ls-files` prints; None if the directory is not in a repository."""
    with suppress(OSError, subprocess.TimeoutExpired):
        words = [*GIT, "-C", str(directory), "ls-files", "-z", *options]
        done = subprocess.run(words, capture_output=True, check=False, timeout=60)
        if done.returncode == 0:
            names = done.stdout.decode(errors="surrogateescape").split("\0")
            return [name for name in names if name not in ("", "./")]  # git lists an empty submodule as itself
    return None


def _walked(directory: Path) -> list[str]:
    found = []
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in _NEVER and name not in links)
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in [*names, *links]]
    return sorted(found)


def _is_inside(directory: Path, name: str) -> bool:
    """Return whether a name is a file, or a link, that is usable in a copy of the directory."""
    path = directory / name
    if not path.exists() or not path.resolve().is_relative_to(directory.resolve()):
        return False
    # The content of a linked file can be copied; a link to a folder must be relative to be valid in the copy.
    return path.is_file() or (path.is_symlink() and not os.path.isabs(os.readlink(path)))


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
