"""Sweeps whose run root is an object store.

The driver works in the copy of the run root on its machine (`launcher.runs.mirror`): the sweep's own files are synced
to the store, each trial is a run of its own there. All functions do nothing for a sweep in a directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launcher.errors import RunError, StorageError
from launcher.runs import RunDirectory
from launcher.runs.mirror import CHECKPOINTS, Mirrored, Sync


def pull_sweep(directory: RunDirectory) -> None:
    """Copy a sweep that another machine drove last to this machine, without checkpoints.

    Raises:
        RunError: the store cannot be read.
    """
    mirrored = Mirrored.of(directory)
    if mirrored is None:
        return
    try:
        mirrored.pull()
    except StorageError as error:
        raise RunError(f"The sweep {directory.name} cannot be read. {error}") from None


@contextmanager
def synced(directory: RunDirectory, is_new: bool) -> Iterator[None]:
    """Sync the sweep's own files to the store inside the context, and at its end.

    Raises:
        RunError: the store cannot be written at the start.
        StorageError: the store cannot be written at the end.
    """
    mirrored = Mirrored.of(directory)
    if mirrored is None:
        yield
        return
    try:
        mirrored.publish()
    except RunError:
        if is_new:  # nothing was trained, so the name can be used again
            shutil.rmtree(directory.path, ignore_errors=True)
        raise
    sync = Sync(mirrored)
    try:
        yield
    finally:
        sync.close()


def pull_trial(trial: RunDirectory) -> None:
    """Copy the files of an ended trial that another machine wrote to this machine, without checkpoints."""
    if (mirrored := Mirrored.of(trial)) is not None:
        with suppress(StorageError):
            mirrored.pull()


def push_trial(trial: RunDirectory) -> None:
    """Copy the record of a trial's end to the store."""
    if (mirrored := Mirrored.of(trial)) is not None:
        with suppress(StorageError):
            mirrored.push_end()


def newest_checkpoint(trial: RunDirectory) -> int | None:
    """Return the step of the newest checkpoint of a trial on the store; None for a trial in a directory."""
    if (mirrored := Mirrored.of(trial)) is None:
        return None
    with suppress(StorageError):
        found = mirrored.newest_checkpoint()
        return 0 if found is None else int(found.rpartition("-")[2])
    return 0


def delete_checkpoints(trial: RunDirectory) -> None:
    """Delete the checkpoints of a trial on the store."""
    if (mirrored := Mirrored.of(trial)) is not None:
        with suppress(StorageError):
            mirrored.store.remove(CHECKPOINTS)
