"""Upload of checkpoints to an object store during training, and their download for a resume.

On a store a checkpoint is complete if its manifest is: the manifest is uploaded last, after the sizes of all other
files were verified, and deleted first. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from launcher.engine.checkpoint import files
from launcher.errors import CheckpointError, StorageError
from launcher.runs import RunDirectory
from launcher.runs.mirror import CHECKPOINTS, cache_of
from launcher.runs.storage import Entry, Store, WrongSize

_WAITING = 2  # maximum number of queued saves if several machines upload
_PARTS_SECONDS = 600.0  # how long rank 0 waits for the files of other machines
_PARTS = ".parts"


@dataclass
class Upload:
    """A save to upload: the local `folder` and the `names` of its files (None: all files of the manifest)."""

    step: int
    folder: Path
    names: list[str] | None = None
    submitted: float = field(default_factory=time.monotonic)


class Uploads:
    """Uploads the checkpoints of one run, on each rank.

    Rank 0 uploads the files of its directory, waits for the files of other machines, and completes the checkpoint. A
    rank on another machine uploads its own file. Only `flush` blocks the training loop. If saves are faster than
    uploads, the newest save is uploaded first, and saves that would be deleted are skipped. On several machines, whose
    ranks must agree, all saves are uploaded in order, and the saving thread waits.

    Args:
        store: the folder `checkpoints` of the run on the store.
        directory: the folder `checkpoints` of the run on this machine.
        scattered: whether the ranks are on several machines.
        note: called with a message if the store cannot be written.
        before_manifest: uploads the other files of the run, so that a run that resumes from the checkpoint on another
            machine has the logs up to its step.
    """

    def __init__(
        self,
        store: Store,
        directory: Path,
        *,
        rank: int,
        scattered: bool,
        note: Callable[[str], None],
        before_manifest: Callable[[], None] | None = None,
    ) -> None:
        self.store, self.directory = store, directory
        self.scattered = scattered
        self.keep, self.best = 1, None  # type: tuple[int, int | None]
        self._rank = rank
        self._note = note
        self._before_manifest = before_manifest
        self._changed = threading.Condition()
        self._waiting: list[Upload] = []
        self._running: Upload | None = None
        self._failed: dict[int, Upload] = {}
        self._newest_uploaded: int | None = None
        self._durations: deque[float] = deque(maxlen=3)  # seconds from `submit` to the end of the upload
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- upload -----------------------------------------------------------------------------------------------------

    def submit(self, step: int, folder: Path, temporary: Path) -> None:
        """Queue a complete checkpoint: `folder` is its final directory on rank 0, `temporary` where it was written."""
        upload = Upload(step, folder)
        if self._rank != 0:
            part = temporary / files.data_file(self._rank)
            if not part.exists():  # rank 0 runs on this machine and uploads it
                return
            upload = Upload(step, temporary, [part.name])
        with self._changed:
            if self.scattered:
                self._changed.wait_for(lambda: len(self._waiting) < _WAITING)
            elif self._rank == 0:
                retained = files.to_keep([one.step for one in self._waiting], step, self.best, self.keep)
                self._waiting = [one for one in self._waiting if one.step in retained and one.step != step]
            self._waiting.append(upload)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pinned(self) -> set[int]:
        """Return the steps whose local files are still needed."""
        with self._changed:
            running = [self._running] if self._running else []
            return {upload.step for upload in (*self._waiting, *running)} | set(self._failed)

    @property
    def seconds(self) -> float | None:
        """Seconds from save to end of upload, the maximum of the last three uploads; None before the first one."""
        return max(self._durations, default=None)

    def settle(self, seconds: float) -> bool:
        """Wait at most `seconds` for pending uploads; return whether all of them succeeded."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting and self._running is None, seconds)
            return done and not self._failed

    def flush(self) -> None:
        """Wait until the newest and the best checkpoint are on the store.

        Raises:
            StorageError: the upload failed; the message names the local directory.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)
            failed = [self._failed[step] for step in sorted(self._failed, reverse=True)]
            self._failed = {}
        for upload in failed:
            try:
                self._send(upload)
            except StorageError as error:
                raise StorageError(
                    f"The checkpoint of step {upload.step} could not be uploaded to the run root. {error} It remains "
                    f"in {upload.folder} on this machine. When the store is reachable again, resume on this machine "
                    "with run.resume=true."
                ) from None

    def close(self) -> None:
        """End the thread after the pending uploads. Failed uploads are not retried."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return
                upload = self._running = self._waiting.pop(0 if self.scattered else -1)
                self._changed.notify_all()
            error: StorageError | None = None
            try:
                self._send(upload)
            except StorageError as found:
                error = found
            except OSError as found:
                error = StorageError(f"{found.strerror or found}.")
            if error is not None and not self._failed:
                self._note(
                    f"The checkpoint of step {upload.step} is not in the run root yet; training continues. {error}"
                )
            with self._changed:
                if error is None:
                    self._durations.append(time.monotonic() - upload.submitted)
                if error is not None:
                    self._failed[upload.step] = upload
                elif self._rank == 0:
                    # A newer checkpoint is on the store: of the failed uploads only the best is still needed.
                    self._failed = {step: one for step, one in self._failed.items() if step == self.best}
                self._running = None
                self._changed.notify_all()

    def _send(self, upload: Upload) -> None:
        target = self.store.under(files.name_of(upload.step))
        if upload.names is not None:
            for name in upload.names:
                target.put(name, upload.folder / name)
                self.store.put_bytes(_receipt(upload.step, name, _digest(upload.folder / name)), b"sent")
                (upload.folder / name).unlink()
            with contextlib.suppress(OSError):  # not empty: other ranks of this machine still upload from it
                upload.folder.rmdir()
            return
        try:
            manifest = files.read_manifest(upload.folder)
        except CheckpointError as error:  # deleted by the user, or a failing disk
            raise StorageError(str(error)) from None
        if files.MANIFEST in target.entries():
            target.put_bytes(files.MANIFEST, b"")  # of an earlier save of this step
        receipts = []
        for name, entry in manifest.items():
            if (upload.folder / name).exists():
                target.put(name, upload.folder / name)
            else:
                receipts.append(_receipt(upload.step, name, entry.checksum))
        self._await(receipts)
        uploaded = target.entries()
        for name, entry in manifest.items():
            if name not in uploaded or uploaded[name].size != entry.size:
                target.put(name, upload.folder / name)  # truncated by a broken connection
        if self._before_manifest is not None:
            self._before_manifest()
        target.put(files.MANIFEST, upload.folder / files.MANIFEST)
        if receipts:
            self.store.remove(f"{_PARTS}/{files.name_of(upload.step)}")
        self._newest_uploaded = max(upload.step, self._newest_uploaded or 0)
        self._prune(self._newest_uploaded)

    def _await(self, receipts: list[str]) -> None:
        deadline = time.monotonic() + _PARTS_SECONDS
        while missing := set(receipts) - set(self.store.entries(_PARTS) if receipts else ()):
            if time.monotonic() > deadline:
                raise StorageError(f"{self.store.uri}: other machines did not upload {', '.join(sorted(missing))}.")
            time.sleep(1.0)

    def _prune(self, newest: int) -> None:
        steps = {files.step_of(name.partition("/")[0]) for name in self.store.entries() if _in_checkpoint(name)}
        steps = {step for step in steps if step <= newest}  # other machines may be uploading later ones
        for step in steps - files.to_keep(steps, newest, self.best, self.keep):
            self._remove(step)

    def _remove(self, step: int) -> None:
        gone = self.store.under(files.name_of(step))
        gone.put_bytes(files.MANIFEST, b"")  # incomplete from now on, in whichever order files are deleted
        gone.remove()

    # ---- search and download ----------------------------------------------------------------------------------------

    def newest(self) -> files.NewestCheckpoint:
        """Return the newest intact checkpoint on this machine or the store; only for rank 0.

        It is downloaded to this machine if necessary, and uploaded to the store if there are several machines.
        """
        remote = steps_on(self.store)
        local = files.available(self.directory)
        skipped: list[files.DamagedCheckpoint] = []
        for step in sorted({*remote, *local}, reverse=True):
            path = self.directory / files.name_of(step)
            try:
                if step in remote:
                    download(self.store, path)
                else:
                    files.verify(path)
                    if self.scattered:
                        self._send(Upload(step, path))
            except CheckpointError as error:
                skipped.append(files.DamagedCheckpoint(path, str(error).replace(f"{path}{os.sep}", "").rstrip(".")))
            else:
                for damaged in skipped:  # the resumed run replaces them
                    if files.step_of(damaged.path) in remote:
                        self._remove(files.step_of(damaged.path))
                return files.NewestCheckpoint(path, skipped)
        return files.NewestCheckpoint(None, skipped)

    def local_copy(self, newest: files.NewestCheckpoint) -> files.NewestCheckpoint:
        """Return the checkpoint that rank 0 found, with its path on this machine, downloaded if it is not there."""
        if newest.path is None:
            return newest
        path = self.directory / newest.path.name
        download(self.store, path)
        return files.NewestCheckpoint(path, newest.skipped)


def steps_on(store: Store) -> dict[int, Entry]:
    """Return the complete checkpoints on a store as step -> manifest, oldest first; an empty manifest is incomplete."""
    found = {}
    for name, entry in store.entries().items():
        if _in_checkpoint(name) and name.endswith(f"/{files.MANIFEST}") and entry.size:
            found[files.step_of(name.partition("/")[0])] = entry
    return dict(sorted(found.items()))


def downloaded(uri: str) -> Path:
    """Download a checkpoint (URI ROOT/RUN/checkpoints/step-…) to the cache, if it is not there; return its path."""
    root, run, _, name = uri.rsplit("/", 3)
    path = cache_of(root) / run / CHECKPOINTS / name
    download(Store.open(uri.rpartition("/")[0]), path)
    return path


def fetch(run: RunDirectory, best: int | None) -> Path | None:
    """Download a run's best checkpoint, or the newest intact one; return its path, or None if the run has none.

    Raises:
        CheckpointError: the best checkpoint is damaged.
        StorageError: the store cannot be read.
    """
    assert run.uri is not None
    store = Store.open(run.uri).under(CHECKPOINTS)
    steps = steps_on(store)
    if best in steps:
        path = run.checkpoints / files.name_of(best)
        download(store, path)
        return path
    for step in reversed(steps):
        path = run.checkpoints / files.name_of(step)
        with contextlib.suppress(CheckpointError):
            download(store, path)
            return path
    return None


def download(store: Store, path: Path) -> None:
    """Download the checkpoint `path` from the store unless it is intact on this machine.

    Only files that a checkpoint can have are downloaded, each with the size in the manifest, and the directory gets its
    name after it was verified. Several processes of a machine may call this function concurrently.

    Raises:
        CheckpointError: the checkpoint on the store is damaged.
        StorageError: the store cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        with contextlib.suppress(CheckpointError):
            files.verify(path)
            return
        source = store.under(path.name)
        temporary = path.parent / files.new_name(files.step_of(path), "tmp")
        temporary.mkdir()
        try:
            remote = source.entries(recursive=False)
            manifest = remote.get(files.MANIFEST)
            if manifest is None or manifest.size > files.MAX_JSON_BYTES:
                raise CheckpointError(f"{source.uri} has no manifest.")
            source.get(files.MANIFEST, temporary / files.MANIFEST, manifest.size)
            for name, entry in files.read_manifest(temporary).items():
                if name not in remote:
                    raise CheckpointError(f"{name} is missing.")
                if remote[name].size != entry.size:
                    raise CheckpointError(f"{name} has {remote[name].size} bytes instead of {entry.size}.")
                source.get(name, temporary / name, entry.size)
            files.verify(temporary)
            if path.exists():  # damaged on this machine, intact on the store
                shutil.rmtree(path)
            temporary.rename(path)
        except WrongSize as error:
            raise CheckpointError(str(error)) from None
        except FileNotFoundError:
            raise CheckpointError(f"{source.uri} was deleted during the download.") from None
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(f"{temporary}{os.sep}", "")) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / ".bring.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _receipt(step: int, name: str, checksum: str) -> str:
    return f"{_PARTS}/{files.name_of(step)}/{name}-{checksum}"


def _digest(file: Path) -> str:
    """Return the checksum of a part, which distinguishes this save from an earlier save of the same step."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _in_checkpoint(name: str) -> bool:
    folder, _, rest = name.partition("/")
    try:
        files.step_of(folder)
    except ValueError:
        return False
    return bool(rest)
