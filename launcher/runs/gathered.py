"""The file system of run.root=head:///PATH: several machines write runs to the disk of one machine.

    head:///var/runs          the directory /var/runs of the machine on which the run is driven

It behaves like an object store (`launcher.runs.storage`): a file appears when it is complete, folders are created with
their files. On the driver's machine operations use the disk; on others they go through a process there (`through`),
which `launcher.clusters.remote.from_driver` provides. No Ray here.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import fs

SCHEME = "head"
BLOCK_BYTES = 4 << 20
_TEMPORARY = ".gathering"

Call = Callable[..., Any]  # (name of a method of Disk, its arguments) -> its result


class Disk:
    """Operations on the files of this machine. Each is atomic and may be repeated."""

    def info(self, path: str) -> tuple[str, int, float]:
        """Return (file, dir or none, bytes, time of the last change)."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return "none", 0, 0.0
        return ("dir" if os.path.isdir(path) else "file"), found.st_size, found.st_mtime

    def below(self, path: str, recursive: bool) -> list[tuple[str, str, int, float]]:
        """Return the entries of a folder: (path, and as `info`). FileNotFoundError if it does not exist."""
        if not os.path.isdir(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        found = []
        for folder, folders, names in os.walk(path):
            for name in (*folders, *names):
                if not name.endswith(_TEMPORARY):
                    place = os.path.join(folder, name)
                    found.append((place, *self.info(place)))
            if not recursive:
                break
        return [one for one in found if one[1] != "none"]

    def read(self, path: str, start: int, most: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(most)

    def write(self, path: str, start: int, block: bytes) -> None:
        """Write a part of an unfinished file; `finish` completes it."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, block, start)
        finally:
            os.close(descriptor)

    def finish(self, temporary: str, path: str, size: int) -> None:
        try:
            os.truncate(temporary, size)
            os.replace(temporary, path)
        except FileNotFoundError:  # done already, and the response was lost
            if self.info(path)[1] != size:
                raise

    def remove_folder(self, path: str) -> None:
        """FileNotFoundError if it does not exist."""
        shutil.rmtree(path)


_direct = Disk()


def _call_here(name: str, *arguments: Any) -> Any:
    return getattr(_direct, name)(*arguments)


_call: Call = _call_here


def through(call: Call) -> None:
    """Redirect all operations of this process to another machine."""
    global _call
    _call = call


def filesystem() -> fs.FileSystem:
    return fs.PyFileSystem(_Handler())


class _Source(io.RawIOBase):
    """A file that is read from its beginning."""

    def __init__(self, path: str) -> None:
        kind, self._size, _ = _call("info", path)
        if kind != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._path, self._place = path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = _call("read", self._path, self._place, min(len(buffer), BLOCK_BYTES))
        buffer[: len(block)] = block
        self._place += len(block)
        return len(block)


class _Sink:
    """A file to write. Not a class of `io`: those close themselves at garbage collection, and closing completes the
    file."""

    def __init__(self, path: str) -> None:
        self._path, self._place, self.closed = path, 0, False
        folder, name = os.path.split(path)
        self._temporary = f"{folder}/.{name}.{secrets.token_hex(4)}{_TEMPORARY}"

    def write(self, block: Any) -> int:
        view = memoryview(block)
        for start in range(0, len(view), BLOCK_BYTES):
            part = bytes(view[start : start + BLOCK_BYTES])
            _call("write", self._temporary, self._place, part)
            self._place += len(part)
        return len(view)

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not self._place:
                _call("write", self._temporary, 0, b"")
            _call("finish", self._temporary, self._path, self._place)


class _Handler(fs.FileSystemHandler):
    """The part of pyarrow's file-system interface that `launcher.runs.storage.Store` needs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return SCHEME

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [_info(path, *_call("info", path)) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        try:
            found = _call("below", selector.base_dir, selector.recursive)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        return [_info(*one) for one in found]

    def open_input_stream(self, path: str) -> pyarrow.NativeFile:
        return pyarrow.PythonFile(io.BufferedReader(_Source(path), BLOCK_BYTES), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pyarrow.NativeFile:
        return pyarrow.PythonFile(_Sink(path), mode="w")

    def delete_dir(self, path: str) -> None:
        _call("remove_folder", path)

    def _never(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError("the store of a run does not support this operation")

    create_dir = delete_dir_contents = delete_root_dir_contents = delete_file = move = copy_file = _never
    open_input_file = open_append_stream = _never


def _info(path: str, kind: str, size: int, mtime: float) -> fs.FileInfo:
    types = {"file": fs.FileType.File, "dir": fs.FileType.Directory, "none": fs.FileType.NotFound}
    if kind != "file":
        return fs.FileInfo(path, types[kind])
    return fs.FileInfo(path, types[kind], size=size, mtime=datetime.fromtimestamp(mtime, UTC))
