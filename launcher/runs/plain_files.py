"""Opens files of a run's directory, which is untrusted: links, FIFOs and devices are never opened.

`check_directory` checks a whole directory before it is used. `open_file` opens each file in it, also after the check:
without following a link in the last component, and only if it is a regular file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import RunError

MOST_BYTES = 16 << 20  # of a JSON file, which usually has a few thousand
_KINDS = ((stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))


def open_file(path: Path, mode: str = "r", permissions: int = 0o666, **options: Any) -> TextIO:
    """Open a regular file as `open` does in text mode. OSError if it is a link or not a regular file.

    permissions: of a file that is created, less the umask.
    """

    def opener(name: str, flags: int) -> int:
        # O_NONBLOCK: opening a FIFO must not block; the flag has no effect on a regular file.
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, permissions)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return descriptor

    return open(path, mode, opener=opener, **options)  # type: ignore[return-value]


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a file. OSError also if it has more than `most` bytes."""
    with open_file(path, errors="replace") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
        return file.read()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError; ValueError if it is not JSON or is nested too deeply."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def replace_text(path: Path, text: str, permissions: int = 0o666) -> None:
    """Write a temporary file and rename it to `path`: a reader sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open_file(temporary, "x", permissions) as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def problem_at(path: Path, deep: bool = True) -> str | None:
    """Return the first entry of a run's directory that must not be opened, with its kind; None if there is none.

    A link to a path within the directory is allowed.

    Args:
        deep: look into its folders.

    Raises:
        OSError: it cannot be read.
    """
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is {_kind(found.st_mode)}"
    top = os.path.realpath(path)
    for entry in _entries(path, deep):
        if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
            continue
        if entry.is_symlink() and Path(os.path.realpath(entry.path)).is_relative_to(top):
            continue
        try:
            return f"{entry.path} is {_kind(entry.stat(follow_symlinks=False).st_mode)}"
        except FileNotFoundError:  # removed concurrently by an active run
            continue
    return None


def check_directory(path: Path) -> None:
    """Raise RunError unless a run's directory, if it exists, contains only files and folders."""
    try:
        problem = problem_at(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Make it readable for you.") from None
    if problem is not None:
        raise RunError(
            f"{problem}, which is not opened: the directory of a run may come from a stranger, and holds files and "
            "folders alone. Replace it by its target, or remove it. run.root itself may be a link."
        )


def _entries(path: Path, deep: bool) -> Iterator[os.DirEntry[str]]:
    left = [str(path)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                found = list(entries)
        except FileNotFoundError:
            continue
        yield from found
        if deep:
            left += [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "a file" if stat.S_ISREG(mode) else "a device")
