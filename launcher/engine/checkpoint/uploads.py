"""Checkpoints on an object store: sent while training goes on, found and brought back for a resume.

There a checkpoint is complete when its manifest is: the manifest is sent last, after all other files are seen to have
their sizes, and removed first. No torch here.
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

_WAITING = 2  # saves that may wait to be sent from several machines
_PARTS_SECONDS = 600.0  # how long rank 0 waits for what other machines send
_PARTS = ".parts"


@dataclass
class Upload:
    """A save that is to be sent: `folder` here, `names` of the files (None: all that the manifest lists)."""

    step: int
    folder: Path
    names: list[str] | None = None
    submitted: float = field(default_factory=time.monotonic)


class Uploads:
    """One rank's share in sending the checkpoints of one run.

    Rank 0 sends what lies in its directory, waits for the parts that others send, and completes the checkpoint. A rank
    on another machine sends its own part. Nothing here makes the training loop wait, but `flush`; where saves come
    faster than they can be sent, the newest goes first, and what is not to be kept any more is not sent (with several
    machines, whose ranks must agree, all are sent in turn, and the saving thread waits).

    Args:
        store: the run's `checkpoints` there.
        directory: the run's `checkpoints` here.
        scattered: the ranks sit on several machines.
        note: is told, in words, when the store cannot be written.
        before_manifest: sends the files beside the checkpoint, so that a run that continues from it on another
            machine finds what was logged up to its step.
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
        self._owed: dict[int, Upload] = {}  # could not be sent
        self._sent: int | None = None
        self._took: deque[float] = deque(maxlen=3)  # seconds from being submitted to being there
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- sending ----------------------------------------------------------------------------------------------------

    def submit(self, step: int, folder: Path, temporary: Path) -> None:
        """Take a checkpoint that is complete: `folder` where rank 0 has named it, `temporary` where it was written."""
        upload = Upload(step, folder)
        if self._rank != 0:
            part = temporary / files.data_file(self._rank)
            if not part.exists():  # rank 0 sits on this machine and sends it
                return
            upload = Upload(step, temporary, [part.name])
        with self._changed:
            if self.scattered:
                self._changed.wait_for(lambda: len(self._waiting) < _WAITING)
            elif self._rank == 0:
                wanted = files.to_keep([one.step for one in self._waiting], step, self.best, self.keep)
                self._waiting = [one for one in self._waiting if one.step in wanted and one.step != step]
            self._waiting.append(upload)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pinned(self) -> set[int]:
        """The steps whose files are still needed here."""
        with self._changed:
            running = [self._running] if self._running else []
            return {upload.step for upload in (*self._waiting, *running)} | set(self._owed)

    @property
    def seconds(self) -> float | None:
        """How long the slowest of the last three took, from being saved here to being there; None before the first."""
        return max(self._took, default=None)

    def settle(self, seconds: float) -> bool:
        """Give what is being sent so many seconds; tell whether all of it is there."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting and self._running is None, seconds)
            return done and not self._owed

    def flush(self) -> None:
        """Wait until the newest and the best checkpoint are on the store.

        Raises:
            StorageError: they could not be sent; names the directory that keeps them.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)
            owed = [self._owed[step] for step in sorted(self._owed, reverse=True)]
            self._owed = {}
        for upload in owed:
            try:
                self._send(upload)
            except StorageError as error:
                raise StorageError(
                    f"The checkpoint of step {upload.step} could not be copied to the run root. {error} It is kept in "
                    f"{upload.folder} on this machine; when the store can be reached again, continue here with "
                    "run.resume=true."
                ) from None

    def close(self) -> None:
        """Let go of the thread, once nothing waits any more; what could not be sent is not tried again."""
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
            if error is not None and not self._owed:
                self._note(
                    f"The checkpoint of step {upload.step} is not in the run root yet; training goes on. {error}"
                )
            with self._changed:
                if error is None:
                    self._took.append(time.monotonic() - upload.submitted)
                if error is not None:
                    self._owed[upload.step] = upload
                elif self._rank == 0:
                    # A newer one is there: of those that failed only the best is missed.
                    self._owed = {step: one for step, one in self._owed.items() if step == self.best}
                self._running = None
                self._changed.notify_all()

    def _send(self, upload: Upload) -> None:
        target = self.store.under(files.name_of(upload.step))
        if upload.names is not None:
            for name in upload.names:
                target.put(name, upload.folder / name)
                self.store.put_bytes(_receipt(upload.step, name, _digest(upload.folder / name)), b"sent")
                (upload.folder / name).unlink()
            with contextlib.suppress(OSError):  # other ranks of this machine have theirs in it
                upload.folder.rmdir()
            return
        try:
            manifest = files.read_manifest(upload.folder)
        except CheckpointError as error:  # deleted here by hand, or a disk that fails
            raise StorageError(str(error)) from None
        if files.MANIFEST in target.entries():
            target.put_bytes(files.MANIFEST, b"")  # of an earlier save of this step
        elsewhere = []
        for name, entry in manifest.items():
            if (upload.folder / name).exists():
                target.put(name, upload.folder / name)
            else:
                elsewhere.append(_receipt(upload.step, name, entry.checksum))
        self._await(elsewhere)
        there = target.entries()
        for name, entry in manifest.items():
            if name not in there or there[name].size != entry.size:
                target.put(name, upload.folder / name)  # cut short by a connection that broke
        if self._before_manifest is not None:
            self._before_manifest()
        target.put(files.MANIFEST, upload.folder / files.MANIFEST)
        if elsewhere:
            self.store.remove(f"{_PARTS}/{files.name_of(upload.step)}")
        self._sent = max(upload.step, self._sent or 0)
        self._prune(self._sent)

    def _await(self, receipts: list[str]) -> None:
        deadline = time.monotonic() + _PARTS_SECONDS
        while missing := set(receipts) - set(self.store.entries(_PARTS) if receipts else ()):
            if time.monotonic() > deadline:
                raise StorageError(f"{self.store.uri}: other machines did not send {', '.join(sorted(missing))}.")
            time.sleep(1.0)

    def _prune(self, newest: int) -> None:
        steps = {files.step_of(name.partition("/")[0]) for name in self.store.entries() if _in_checkpoint(name)}
        steps = {step for step in steps if step <= newest}  # of later ones other machines may have sent their part
        for step in steps - files.to_keep(steps, newest, self.best, self.keep):
            self._remove(step)

    def _remove(self, step: int) -> None:
        gone = self.store.under(files.name_of(step))
        gone.put_bytes(files.MANIFEST, b"")  # absent from here on, whatever is deleted first
        gone.remove()

    # ---- finding -----------------------------------------------------------------------------------------------------

    def newest(self) -> files.NewestCheckpoint:
        """Return the newest checkpoint, here or on the store, that verifies; it is here afterwards. For rank 0.

        With several machines it is on the store afterwards as well.
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
                for damaged in skipped:  # what follows makes another history
                    if files.step_of(damaged.path) in remote:
                        self._remove(files.step_of(damaged.path))
                return files.NewestCheckpoint(path, skipped)
        return files.NewestCheckpoint(None, skipped)

    def local_copy(self, newest: files.NewestCheckpoint) -> files.NewestCheckpoint:
        """Return what rank 0 has found as it lies on this machine, brought from the store if need be."""
        if newest.path is None:
            return newest
        path = self.directory / newest.path.name
        download(self.store, path)
        return files.NewestCheckpoint(path, newest.skipped)


def steps_on(store: Store) -> dict[int, Entry]:
    """Return the complete checkpoints on a store, oldest first, as step -> manifest; an empty one is being written."""
    found = {}
    for name, entry in store.entries().items():
        if _in_checkpoint(name) and name.endswith(f"/{files.MANIFEST}") and entry.size:
            found[files.step_of(name.partition("/")[0])] = entry
    return dict(sorted(found.items()))


def downloaded(uri: str) -> Path:
    """Return the place on this machine of a checkpoint on a store (ROOT/RUN/checkpoints/step-…), brought if need be."""
    root, run, _, name = uri.rsplit("/", 3)
    path = cache_of(root) / run / CHECKPOINTS / name
    download(Store.open(uri.rpartition("/")[0]), path)
    return path


def fetch(run: RunDirectory, best: int | None) -> Path | None:
    """Bring a run's best checkpoint, or the newest intact one, from the store to this machine; None where it has none.

    Raises:
        CheckpointError: the best is there and damaged.
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
    """See that the checkpoint `path` is here and intact: copy it from the store unless it is.

    Only files that a checkpoint can have are copied, each with the size that the manifest gives; nothing gets its name
    before all of it has been verified. Several processes of a machine may call it at once.

    Raises:
        CheckpointError: that on the store is damaged.
        StorageError: the store cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        with contextlib.suppress(CheckpointError):
            files.verify(path)
            return
        source = store.under(path.name)
        temporary = path.parent / files.new_name(files.step_of(path), "tmp")
        temporary.mkdir()
        try:
            there = source.entries(recursive=False)
            manifest = there.get(files.MANIFEST)
            if manifest is None or manifest.size > files.MAX_JSON_BYTES:
                raise CheckpointError(f"{source.uri} has no manifest.")
            source.get(files.MANIFEST, temporary / files.MANIFEST, manifest.size)
            for name, entry in files.read_manifest(temporary).items():
                if name not in there:
                    raise CheckpointError(f"{name} is missing.")
                if there[name].size != entry.size:
                    raise CheckpointError(f"{name} has {there[name].size} bytes instead of {entry.size}.")
                source.get(name, temporary / name, entry.size)
            files.verify(temporary)
            if path.exists():  # damaged here, intact there
                shutil.rmtree(path)
            temporary.rename(path)
        except WrongSize as error:
            raise CheckpointError(str(error)) from None
        except FileNotFoundError:
            raise CheckpointError(f"{source.uri} was removed meanwhile.") from None
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(f"{temporary}{os.sep}", "")) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / ".bring.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _receipt(step: int, name: str, checksum: str) -> str:
    return f"{_PARTS}/{files.name_of(step)}/{name}-{checksum}"


def _digest(file: Path) -> str:
    """Return the checksum of a part, which tells this save from an earlier one of the same step."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _in_checkpoint(name: str) -> bool:
    folder, _, rest = name.partition("/")
    try:
        files.step_of(folder)
    except ValueError:
        return False
    return bool(rest)
