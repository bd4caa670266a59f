"""Verifies that all machines share the run's storage, and syncs a run on an object store during training."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.engine.checkpoint import files
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.control import Control
from launcher.engine.runtime import Runtime
from launcher.errors import RunError, StorageError, from_dict, to_dict
from launcher.runs import RunDirectory
from launcher.runs.host_logs import log_of_host, take_over, take_up_log
from launcher.runs.mirror import CHECKPOINTS, GATHERED_SYNC_SECONDS, SYNC_SECONDS, Mirrored, Sync
from launcher.runs.storage import Store, is_gathered

# Time that a failing run waits for its current upload.
SETTLE_SECONDS = 60.0
_PROBE = ".probe-"


@dataclass(frozen=True)
class Outputs:
    """The outputs of a rank: its log file, and the uploader of its checkpoints (None for a run in a directory)."""

    log: Path
    uploads: Uploads | None


@contextmanager
def open_outputs(directory: RunDirectory, runtime: Runtime, control: Control) -> Iterator[Outputs]:
    """Check that all workers share the run's storage, and sync the run to its object store inside the context.

    Open and close the log inside the context, which uploads the last lines of the log at its end.

    Raises:
        RunError: the machine of a worker does not see the files of the others.
        StorageError: the store cannot be read, or cannot be written at the end.
    """
    mirrored = Mirrored.of(directory)
    hosts = runtime.gather(socket.gethostname())
    check_shared(directory, mirrored.store if mirrored else None, runtime, hosts)
    if mirrored is None:
        yield Outputs(directory.log, None)
        return
    own_machine = hosts[runtime.rank] == hosts[0]
    is_first_of_host = runtime.rank == hosts.index(hosts[runtime.rank])
    log = log_of_host(hosts[runtime.rank])
    failure = None
    try:
        if runtime.is_first:
            take_over(mirrored, log)
        elif is_first_of_host and not own_machine:
            take_up_log(mirrored, log)
    except (StorageError, OSError) as error:
        failure = error if isinstance(error, StorageError) else StorageError(f"{directory.log}: {error.strerror}.")
    # No rank opens its log before the first rank of its machine has fetched it.
    failures = [each for each in runtime.gather(None if failure is None else to_dict(failure)) if each]
    if failures:
        raise failure or from_dict(failures[0])
    if is_first_of_host and not own_machine and directory.checkpoints.is_dir():
        files.clean(directory.checkpoints)
    every = GATHERED_SYNC_SECONDS if is_gathered(mirrored.store.uri) else SYNC_SECONDS
    sync = Sync(mirrored, None if runtime.is_first else [log], every) if is_first_of_host else None
    uploads = Uploads(
        mirrored.store.under(CHECKPOINTS),
        directory.checkpoints,
        rank=runtime.rank,
        scattered=len(set(hosts)) > 1,
        note=lambda text: control.emit({"kind": "note", "text": text}),
        before_manifest=None if sync is None else sync.flush,
    )
    directory.checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        yield Outputs(directory.log if own_machine else directory.path / log, uploads)
    except BaseException:
        uploads.settle(SETTLE_SECONDS)
        if sync is not None:
            with contextlib.suppress(StorageError, OSError):
                sync.close()
        raise
    finally:
        uploads.close()
    if sync is not None:
        sync.close()
    if is_gathered(mirrored.store.uri):
        _remove_local_checkpoints(directory, runtime, is_first_of_host)


def _remove_local_checkpoints(directory: RunDirectory, runtime: Runtime, is_first_of_host: bool) -> None:
    """Remove the checkpoints of an ended run from this machine after all ranks have uploaded theirs.

    The run's storage has them, and a machine that trains many trials of a sweep would run out of disk space.
    """
    try:
        runtime.gather(None)
    except Exception:  # a rank was lost after it had finished: keep the checkpoints until the run is resumed
        return
    if is_first_of_host:
        shutil.rmtree(directory.checkpoints, ignore_errors=True)


def check_shared(directory: RunDirectory, store: Store | None, runtime: Runtime, hosts: list[str]) -> None:
    """Check that every worker can write, list and delete a small file in the run's storage.

    A directory on a single machine needs no check.

    Raises:
        RunError: names the machines that cannot.
    """
    if store is None and len(set(hosts)) == 1:
        return
    nonce = runtime.broadcast(secrets.token_hex(8) if runtime.is_first else None)
    start = f"{_PROBE}{nonce}" + ("/" if store else "-")
    problems = runtime.gather(_write(directory.path, store, f"{start}{runtime.rank}"))
    visible = runtime.gather(sorted(_visible_ranks(directory.path, store, start)))
    with contextlib.suppress(OSError, StorageError):
        if store is None:
            (directory.path / f"{start}{runtime.rank}").unlink()
        elif runtime.is_first:
            store.remove(start.rstrip("/"))
    failed = []
    for rank, host in enumerate(hosts):
        if problems[rank] is not None:
            failed.append(f"{host} (rank {rank}) cannot write to it: {problems[rank]}")
        elif 0 not in visible[rank] and problems[0] is None:
            failed.append(f"{host} (rank {rank}) does not see the file of {hosts[0]} (rank 0)")
        elif rank not in visible[0]:
            failed.append(f"{hosts[0]} (rank 0) does not see the file of {host} (rank {rank})")
    if failed:
        raise RunError(
            f"run.root is not shared by all machines: {'; '.join(failed)}. Mount the same directory at "
            f"{directory.root} on every machine, or use an object store (run.root=abfss://…, see docs/storage.md)."
            if store is None
            else f"Some machines cannot use the run root {directory.root}: {'; '.join(failed)}. Give every machine the "
            "permissions to read, list, write and delete in it; see docs/storage.md."
        )


def _write(path: Path, store: Store | None, name: str) -> str | None:
    """Write a file and read it back. Return a description of the problem, or None."""
    try:
        if store is not None:
            store.put_bytes(name, name.encode())
            return None if store.read(name) == name.encode() else "its content differs when it is read"
        (path / name).write_text(name)
        return None if (path / name).read_text() == name else "its content differs when it is read"
    except StorageError as error:
        return str(error).rstrip(".")
    except OSError as error:
        return error.strerror or str(error)


def _visible_ranks(path: Path, store: Store | None, start: str) -> set[int]:
    """Return the ranks whose files this rank sees."""
    try:
        names = list(store.entries(start.rstrip("/"))) if store else [one.name for one in path.glob(f"{start}*")]
    except (OSError, StorageError):
        return set()
    return {int(name.removeprefix(start)) for name in names if name.startswith(start)}
