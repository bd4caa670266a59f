"""Checkpoint directories: naming, atomic commit, verification and retention. This module does not import torch.

Layout on disk:

    checkpoints/
      step-00000120/            complete; renamed to this name once all files below are durable
        data-00000.bin …        raw bytes of tensors, one file per rank that writes tensors
        metadata.json           position of each tensor in the data files (`reader`)
        state.json              all values that are not tensors (`nest`)
        manifest.json           size and XXH128 checksum of the files above, written last
      .step-00000120.tmp-1f…    being written
      .step-00000120.old-1f…    replaced by a new checkpoint of the same step
      .step-00000120.gone-1f…   being deleted
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from launcher.errors import CheckpointError

FORMAT = 1
MANIFEST, METADATA, STATE = "manifest.json", "metadata.json", "state.json"
MAX_JSON_BYTES = 1 << 28
BLOCK_BYTES = 16 << 20

_COMPLETE = re.compile(r"step-(\d{8,18})")
_LEFTOVER = re.compile(r"\.(step-\d{8,18})\.(tmp|old|gone)-[0-9a-f]+")
_DATA_FILE = re.compile(r"data-\d{5,9}\.bin")


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry of one file: its size in bytes and its XXH128 checksum in hexadecimal (xxhash.com)."""

    size: int
    checksum: str


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A damaged checkpoint that was skipped, with the reason as text for the user."""

    path: Path
    reason: str


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint, or None, and the newer damaged ones (newest first)."""

    path: Path | None
    skipped: list[DamagedCheckpoint] = field(default_factory=list)

    def explain(self) -> str:
        """Return one line about the skipped checkpoints, or an empty string."""
        if not self.skipped:
            return ""
        names = "; ".join(f"{damaged.path.name}: {damaged.reason}" for damaged in self.skipped)
        outcome = f"using {self.path.name}" if self.path else "no intact checkpoint is left"
        return f"Skipped {len(self.skipped)} damaged checkpoint(s) ({names}); {outcome}."

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, to be broadcast to the other ranks."""
        skipped = [[str(damaged.path), damaged.reason] for damaged in self.skipped]
        return {"path": None if self.path is None else str(self.path), "skipped": skipped}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> NewestCheckpoint:
        path = None if found["path"] is None else Path(found["path"])
        return cls(path, [DamagedCheckpoint(Path(damaged), reason) for damaged, reason in found["skipped"]])


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def data_file(rank: int) -> str:
    return f"data-{rank:05d}.bin"


def step_of(path: str | os.PathLike[str]) -> int:
    """Return the step in the name of a checkpoint directory.

    Raises:
        ValueError: the name is not that of a checkpoint.
    """
    match = _COMPLETE.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step-<8 digits>)")
    return int(match[1])


def available(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """Return all checkpoints in `directory` as step -> path, oldest first, without verifying them."""
    found = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            match = _COMPLETE.fullmatch(entry.name)
            if match and entry.is_dir():
                found[int(match[1])] = Path(entry.path)
    return dict(sorted(found.items()))


def verify(path: str | os.PathLike[str]) -> None:
    """Verify the size and checksum of every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    path = Path(path)
    for name, entry in read_manifest(path).items():
        digest = xxhash.xxh3_128()
        with open_regular(path / name, entry.size) as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
        if digest.hexdigest() != entry.checksum:
            raise CheckpointError(
                f"{path / name} was altered after it was written (its checksum differs from the manifest)."
            )


def newest_intact(directory: str | os.PathLike[str]) -> NewestCheckpoint:
    """Return the newest checkpoint in `directory` that passes `verify`, and the damaged ones that were skipped."""
    skipped = []
    for path in reversed(available(directory).values()):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(DamagedCheckpoint(path, str(error).replace(f"{path}{os.sep}", "").rstrip(".")))
        else:
            return NewestCheckpoint(path, skipped)
    return NewestCheckpoint(None, skipped)


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """Return name -> entry for every file of a checkpoint.

    Raises:
        CheckpointError: the checkpoint or its manifest is missing, or the manifest is invalid.
    """
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    manifest = path / MANIFEST
    content = read_json(manifest)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{manifest} is not a manifest of format {FORMAT}; the checkpoint was not written by this program."
        )
    entries = {}
    for name, entry in files.items():
        size, checksum = (entry.get("size"), entry.get("xxh128")) if isinstance(entry, dict) else (None, None)
        if name not in (METADATA, STATE) and not _DATA_FILE.fullmatch(name):
            raise CheckpointError(f"{manifest} names a file {name!r}, which is not a file of a checkpoint.")
        if type(size) is not int or size < 0 or not isinstance(checksum, str):
            raise CheckpointError(f"{manifest} gives no size and checksum (xxh128) for {name}.")
        entries[name] = FileEntry(size, checksum)
    if missing := {METADATA, STATE} - entries.keys():
        raise CheckpointError(f"{manifest} does not list {', '.join(sorted(missing))}.")
    return entries


@contextlib.contextmanager
def open_regular(file: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file of a checkpoint for unbuffered reading, without following a symbolic link.

    Raises:
        CheckpointError: the file cannot be read, is not a regular file, or does not have `size` bytes.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not block.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a regular file.")
        if size is not None and status.st_size != size:
            raise CheckpointError(f"{file} has {status.st_size} bytes instead of {size}.")
        try:
            yield stream
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def read_json(file: Path, size: int | None = None) -> Any:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is too large, or is not valid JSON.
    """
    with open_regular(file, size) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES} bytes, the limit of a checkpoint.")
        try:
            return json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is not valid JSON ({type(error).__name__}).") from error


# --- writing ---------------------------------------------------------------------------------------------------------


def new_name(step: int, kind: str) -> str:
    return f".{name_of(step)}.{kind}-{secrets.token_hex(4)}"


def write_file(file: Path, blocks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file, flush it to disk, and return its size and checksum.

    Raises:
        OSError: the file exists or cannot be written.
    """
    digest, size, filled = xxhash.xxh3_128(), 0, 0
    # O_DIRECT requires memory that is aligned to a page.
    buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    with open(file, "xb", buffering=0) as stream:
        for block in blocks:
            rest = memoryview(block)
            while rest:
                part = rest[: BLOCK_BYTES - filled]
                buffer[filled : filled + len(part)] = part
                filled, rest = filled + len(part), rest[len(part) :]
                if filled == BLOCK_BYTES:
                    digest.update(buffer)
                    _write(stream, buffer)
                    size, filled = size + filled, 0
        digest.update(buffer[:filled])
        _write(stream, buffer[:filled])
        os.fsync(stream.fileno())
    return FileEntry(size + filled, digest.hexdigest())


def _write(stream: BinaryIO, data: memoryview) -> None:
    """Write all of `data`; whole blocks bypass the page cache where the file system supports O_DIRECT (open(2)).

    Writing through the page cache costs CPU time for one more copy of every byte, and evicts cached data sets.
    """
    while data:  # a write may be partial
        _direct(stream, len(data) == BLOCK_BYTES)
        try:
            written = stream.write(data)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: O_DIRECT is supported, but not for this block
                raise
            _direct(stream, False)
            written = stream.write(data)
        data = data[written:]


def _direct(stream: BinaryIO, enable: bool) -> None:
    flags = fcntl.fcntl(stream, fcntl.F_GETFL)
    with contextlib.suppress(OSError):  # EINVAL: the file system does not support O_DIRECT
        fcntl.fcntl(stream, fcntl.F_SETFL, flags | os.O_DIRECT if enable else flags & ~os.O_DIRECT)


def write_json(file: Path, content: Any) -> FileEntry:
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{file.name} would have {len(text)} bytes; store large data in tensors, not in lists")
    return write_file(file, [text])


def write_manifest(path: Path, step: int, files: Mapping[str, FileEntry]) -> None:
    """Write the manifest, which completes the checkpoint directory `path`."""
    entries = {name: {"size": entry.size, "xxh128": entry.checksum} for name, entry in sorted(files.items())}
    write_json(path / MANIFEST, {"format": FORMAT, "step": step, "files": entries})
    sync_directory(path)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems support fsync on files only
            raise
    finally:
        os.close(descriptor)


def commit(temporary: Path, directory: Path, step: int) -> Path:
    """Rename a complete directory to its final name, durably, and return its path.

    An existing checkpoint of the same step is renamed first and deleted afterwards. If the process is killed in
    between, `clean` restores one of the two from its temporary name.
    """
    final = directory / name_of(step)
    old = None
    if final.exists():
        old = directory / new_name(step, "old")
        final.rename(old)
    temporary.rename(final)
    sync_directory(directory)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def clean(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove the leftovers of interrupted saves and deletions from `directory`; return the removed paths.

    Call it only while no other process writes there. A checkpoint that was complete when its process was killed, but
    not yet renamed, is renamed to its final name.
    """
    directory, removed = Path(directory), []
    leftovers = [
        (match[2], match[1], path) for path in directory.iterdir() if (match := _LEFTOVER.fullmatch(path.name))
    ]
    for kind, name, path in sorted(leftovers, key=lambda leftover: ("tmp", "old", "gone").index(leftover[0])):
        if kind != "gone" and not (directory / name).exists():
            with contextlib.suppress(CheckpointError, OSError):
                verify(path)
                path.rename(directory / name)
                sync_directory(directory)
                continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def to_keep(steps: Iterable[int], newest: int, best: int | None, keep: int) -> set[int]:
    """Return the `steps` to keep after `newest` was committed: the best and the `keep` newest, always with `newest`.

    Steps later than `newest` are not kept and do not count. They belong to a run before a resume, which skipped them
    because they are damaged.
    """
    steps = set(steps)
    past = sorted((step for step in steps if step <= newest), reverse=True)
    return {newest, *past[: max(keep, 1)], *({best} & steps if best is not None else ())}


def prune(directory: Path, newest: int, best: int | None, keep: int, pinned: Iterable[int] = ()) -> str:
    """Delete the checkpoints that neither `to_keep` nor `pinned` contains; return an error message or an empty text."""
    found, failure = available(directory), ""
    retained = to_keep(found, newest, best, keep).union(pinned)
    for step, path in found.items():
        if step not in retained:
            try:
                # Renamed first, so that a partly deleted checkpoint never has a checkpoint's name.
                gone = path.rename(directory / new_name(step, "gone"))
                shutil.rmtree(gone)
            except OSError as error:
                failure = f"The old checkpoint {path} could not be deleted: {error.strerror}."
    return failure
