"""Whether all machines see the same run, and a run on an object store while it is trained."""

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

# A run that fails waits so long for what is on its way to the store.
SETTLE_SECONDS = 60.0
_PROBE = ".probe-"


@dataclass(frozen=True)
class Outputs:
    """Where a rank writes: its log, and what sends its checkpoints (None where the run is in a directory)."""

    log: Path
    uploads: Uploads | None


@contextmanager
def open_outputs(directory: RunDirectory, runtime: Runtime, control: Control) -> Iterator[Outputs]:
    """Check that all workers share the run, and keep its copy on the store up to date while inside.

    Open the log inside, and close it there: the log's last lines are sent when this context ends.

    Raises:
        RunError: a worker's machine does not see what the others write.
        StorageError: the store cannot be read or, at the end, not be written.
    """
    mirrored = Mirrored.of(directory)
    hosts = runtime.gather(socket.gethostname())
    check_shared(directory, mirrored.store if mirrored else None, runtime, hosts)
    if mirrored is None:
        yield Outputs(directory.log, None)
        return
    own_machine = hosts[runtime.rank] == hosts[0]
    speaks = runtime.rank == hosts.index(hosts[runtime.rank])  # the first rank of its machine
    log = log_of_host(hosts[runtime.rank])
    failure = None
    try:
        if runtime.is_first:
            take_over(mirrored, log)
        elif speaks and not own_machine:
            take_up_log(mirrored, log)
    except (StorageError, OSError) as error:
        failure = error if isinstance(error, StorageError) else StorageError(f"{directory.log}: {error.strerror}.")
    # No rank opens its log before the first rank of its machine is done here.
    found = [each for each in runtime.gather(None if failure is None else to_dict(failure)) if each]
    if found:
        raise failure or from_dict(found[0])
    if speaks and not own_machine and directory.checkpoints.is_dir():
        files.clean(directory.checkpoints)
    every = GATHERED_SYNC_SECONDS if is_gathered(mirrored.store.uri) else SYNC_SECONDS
    sync = Sync(mirrored, None if runtime.is_first else [log], every) if speaks else None
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
        _give_up_copies(directory, runtime, speaks)


def _give_up_copies(directory: RunDirectory, runtime: Runtime, speaks: bool) -> None:
    """Remove the checkpoints of a run that has ended from this machine, when all ranks have sent what they had.

    The disk that keeps the run has them; machines that train one trial of a sweep after the other would fill up.
    """
    try:
        runtime.gather(None)
    except Exception:  # a rank was lost after its work was done; the copies stay until the run is continued
        return
    if speaks:
        shutil.rmtree(directory.checkpoints, ignore_errors=True)


def check_shared(directory: RunDirectory, store: Store | None, runtime: Runtime, hosts: list[str]) -> None:
    """Have every worker write, see the others', and delete a small file. RunError names the machines that do not.

    On one machine a directory needs no such question.
    """
    if store is None and len(set(hosts)) == 1:
        return
    nonce = runtime.broadcast(secrets.token_hex(8) if runtime.is_first else None)
    start = f"{_PROBE}{nonce}" + ("/" if store else "-")
    problems = runtime.gather(_write(directory.path, store, f"{start}{runtime.rank}"))
    sights = runtime.gather(sorted(_see(directory.path, store, start)))
    with contextlib.suppress(OSError, StorageError):
        if store is None:
            (directory.path / f"{start}{runtime.rank}").unlink()
        elif runtime.is_first:
            store.remove(start.rstrip("/"))
    complaints = []
    for rank, host in enumerate(hosts):
        if problems[rank] is not None:
            complaints.append(f"{host} (rank {rank}) cannot write there: {problems[rank]}")
        elif 0 not in sights[rank] and problems[0] is None:
            complaints.append(f"{host} (rank {rank}) does not see what {hosts[0]} (rank 0) wrote")
        elif rank not in sights[0]:
            complaints.append(f"{hosts[0]} (rank 0) does not see what {host} (rank {rank}) wrote")
    if complaints:
        raise RunError(
            f"run.root is not shared by all machines: {'; '.join(complaints)}. Mount the same directory at "
            f"{directory.root} on every machine, or use an object store (run.root=abfss://…, see docs/storage.md)."
            if store is None
            else f"The run root {directory.root} does not serve all machines: {'; '.join(complaints)}. Give every "
            "machine the right to read, list, write and delete there; see docs/storage.md."
        )


def _write(path: Path, store: Store | None, name: str) -> str | None:
    """Write and read back; return what went wrong, in words."""
    try:
        if store is not None:
            store.put_bytes(name, name.encode())
            return None if store.read(name) == name.encode() else "it reads other than was written"
        (path / name).write_text(name)
        return None if (path / name).read_text() == name else "it reads other than was written"
    except StorageError as error:
        return str(error).rstrip(".")
    except OSError as error:
        return error.strerror or str(error)


def _see(path: Path, store: Store | None, start: str) -> set[int]:
    """Return the ranks whose files are seen."""
    try:
        names = list(store.entries(start.rstrip("/"))) if store else [one.name for one in path.glob(f"{start}*")]
    except (OSError, StorageError):
        return set()
    return {int(name.removeprefix(start)) for name in names if name.startswith(start)}
