"""A run root on an object store, and its copy on this machine.

All code uses the copy, which is an ordinary directory: the engine writes there, `launch runs` reads there. This module
copies files between the two. `engine.checkpoint.uploads` transfers checkpoints.

    $XDG_CACHE_HOME/launch/roots/<name>-<hash of the URI>/
      .store                the URI (`launcher.runs.store_copies`)
      <run>/                as in any run root, and
        .owner              this copy belongs to the machine that wrote the run last; the store has the same file

A machine claims a run before it writes it: it pulls the changes of others, then stores a token in the copy and on the
store. As long as the store has this token, no other machine has written since, and the copy contains at least the
content of the store.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunError, StorageError
from launcher.runs import store_copies
from launcher.runs.directory import RunDirectory, write_text
from launcher.runs.storage import Entry, Store, WrongSize, check_uri, is_uri
from launcher.runs.store_copies import MARK

CHECKPOINTS = "checkpoints"
OWNER = ".owner"
RESULT = "result.json"
_REQUESTS = ".requests"  # on the store: requests of other machines
SYNC_SECONDS = 5.0
GATHERED_SYNC_SECONDS = 1.0  # on the disk of the driver's machine, where requests are cheap
HOST_LOG = re.compile(r"log-[^/]*\.txt")  # of a machine other than rank 0's, which is its only writer
# Operations that the user waits for, before training, are retried for a shorter time than those of a run.
HASTY_SECONDS = 15.0
# The files that list runs and their state; other files of a run are copied on demand.
FACTS = ("config.yaml", "overrides.yaml", "result.json", ".heartbeat")
_THREADS = 16
_REFRESH_SECONDS = 2.0
_OLD_SECONDS = 3600.0
_BOARD_SECONDS = 10.0
_refreshed: dict[str, float] = {}


def cache_of(uri: str) -> Path:
    """Return the directory of this machine that mirrors a run root, created on demand. RunError if that fails.

    It is in $XDG_CACHE_HOME (~/.cache), or in the temporary folder if that is not writable.
    """
    problem: OSError | None = None
    bases = store_copies.bases()
    for base in bases:
        root = store_copies.copy_below(base, uri)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not store_copies.is_own(base):
                continue  # another user's, in a folder where all users may write
            if not (root / MARK).exists():
                temporary = root / f"{MARK}.{os.getpid()}.tmp"
                temporary.write_text(uri)
                os.replace(temporary, root / MARK)
        except OSError as error:
            problem = error
            continue
        return root
    why = f": {problem.strerror}" if problem else ""
    raise RunError(
        f"There is no place for the local copy of {uri}: {bases[0]} cannot be written{why}. Set XDG_CACHE_HOME."
    )


def local(place: str) -> Path:
    """Return the directory of this machine for a run given by its path or its URI, created on demand."""
    if not is_uri(place):
        return Path(place)
    root, _, name = place.rpartition("/")
    path = (store_copies.sweep_below(root) or cache_of(root)) / name
    path.mkdir(exist_ok=True)
    return path


def root_of(uri: str) -> Path:
    """Return the local copy of a run root, with the current state of all its runs on the store.

    Raises:
        ConfigError: the URI is invalid.
        RunError: the store cannot be read.
    """
    uri = check_uri(uri)
    root = cache_of(uri)
    if time.monotonic() - _refreshed.get(uri, -_REFRESH_SECONDS) >= _REFRESH_SECONDS:
        refresh(root)
        _refreshed[uri] = time.monotonic()
    return root


def refresh(root: Path, wanted: Callable[[str], bool] | None = None) -> None:
    """Copy the `wanted` files of all runs from the store, except for the runs that this machine owns."""
    uri = store_copies.uri_of(root)
    if uri is None:
        raise RunError(f"{root} is no copy of a run root on an object store. Name the root by its URI.")
    store = Store.open(uri, HASTY_SECONDS)
    try:
        entries = store.entries()
        by_run: dict[str, dict[str, Entry]] = {}
        for name, entry in entries.items():
            run, _, rest = name.partition("/")
            if rest and not run.startswith("."):
                by_run.setdefault(run, {})[rest] = entry
        for run, files in by_run.items():
            if not _owned(store.under(run), root / run, files):
                chosen = {name: e for name, e in files.items() if (wanted(name) if wanted else name in FACTS)}
                _copy(store.under(run), root / run, chosen)
    except StorageError as error:
        raise RunError(f"The run root cannot be read. {error} See docs/storage.md for what it needs.") from None
    for path in root.iterdir():  # copies of runs that were removed from the store; a starting run is recent
        old = path.is_dir() and path.stat().st_mtime < time.time() - _OLD_SECONDS
        if old and path.name not in by_run and not (path / OWNER).exists():
            shutil.rmtree(path, ignore_errors=True)


def _owned(store: Store, run: Path, files: Iterable[str]) -> bool:
    """Return whether no other machine has written the run since this machine did; `files` are those on the store."""
    with contextlib.suppress(FileNotFoundError):
        return OWNER in files and (run / OWNER).read_bytes() == store.read(OWNER)
    return False


def _copy(store: Store, run: Path, files: Mapping[str, Entry]) -> None:
    """Copy files that differ in size or time. An empty file is being written: the old one is kept."""

    def one(name: str, entry: Entry) -> None:
        target = run / name
        with contextlib.suppress(FileNotFoundError):
            found = target.lstat()
            if found.st_size == entry.size and abs(found.st_mtime - entry.mtime) < 1e-3:
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, WrongSize):  # removed or written concurrently: copied the next time
            store.get(name, target, entry.size)
            os.utime(target, (entry.mtime, entry.mtime))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda item: one(*item), [item for item in files.items() if item[1].size]))


def _is_own(name: str) -> bool:
    """Return whether a file of a run, or of a trial of a sweep, is mirrored: neither a checkpoint nor unfinished."""
    ours = (f"{CHECKPOINTS}/", f"{_REQUESTS}/", OWNER, ".probe", ".stop")
    trial, _, rest = name.partition("/")
    foreign = name.startswith(ours) or (trial.isdecimal() and rest.startswith(ours))
    return not (foreign or name.endswith((".tmp", ".lock")))


@dataclass(frozen=True)
class Mirrored:
    """One run on a store, and its local copy."""

    run: RunDirectory
    store: Store

    @classmethod
    def of(cls, run: RunDirectory, patience: float | None = None) -> Mirrored | None:
        """Return it if the run's root is the copy of one on a store, else None."""
        return None if run.uri is None else cls(run, Store.open(run.uri, patience))

    def pull(self) -> bool:
        """Copy everything except checkpoints to this machine, unless no other machine has written; return whether none
        has.

        Local checkpoints that the store does not have belong to a history that another machine has discarded.
        """
        files = self.store.entries()
        if not files or _owned(self.store, self.run.path, files):
            return False
        self.run.path.mkdir(parents=True, exist_ok=True)
        for name in _files(self.run.path):
            if name not in files:
                (self.run.path / name).unlink(missing_ok=True)
        for path in self.run.checkpoints.glob("*step-*"):
            if f"{CHECKPOINTS}/{path.name}/manifest.json" not in files:
                shutil.rmtree(path, ignore_errors=True)
        _copy(self.store, self.run.path, {name: entry for name, entry in files.items() if _is_own(name)})
        return True

    def claim(self) -> None:
        """Record, locally and on the store, that this machine writes the run from now on. Call `pull` first."""
        token = secrets.token_hex(8)
        self.store.put_bytes(OWNER, token.encode())
        write_text(self.run.path / OWNER, token)

    def push(self, names: Iterable[str] | None = None) -> None:
        """Copy files, or all except checkpoints, to the store."""
        for name in _files(self.run.path) if names is None else names:
            with contextlib.suppress(FileNotFoundError):
                self.store.put(name, self.run.path / name)

    def publish(self) -> None:
        """Claim a starting run and upload its first files. RunError if that fails."""
        try:
            self.claim()
            self.push()
            self.store.remove(_REQUESTS)
        except StorageError as error:
            raise RunError(f"The run root cannot be written. {error} See docs/storage.md for what it needs.") from None

    def push_end(self) -> None:
        """Upload the record of a run's end. If another machine wrote the run, this one takes it over."""
        if _owned(self.store, self.run.path, self.store.entries(recursive=False)):
            self.push()  # including what a killed worker of this machine wrote
            return
        self.claim()
        self.push(["log.txt", "result.json"])

    def remove(self) -> None:
        """Remove the uploaded files of a run that could not start."""
        self.store.remove()

    def request_stop(self) -> None:
        self.store.put_bytes(f"{_REQUESTS}/stop", b"stop")

    def stop_requested(self) -> bool:
        return bool(self.store.entries(_REQUESTS))

    def newest_checkpoint(self) -> str | None:
        """Return the URI of the newest complete checkpoint on the store; it is not verified."""
        there = sorted(self.store.entries(CHECKPOINTS).items())
        found = [name for name, entry in there if name.endswith("/manifest.json") and "/step-" in name and entry.size]
        return f"{self.store.uri}/{found[-1].rpartition('/')[0]}" if found else None


@contextlib.contextmanager
def written(run: RunDirectory) -> Iterator[None]:
    """Context for additions to a trained run: pulls the store's files first, and uploads new ones."""
    mirrored = Mirrored.of(run)
    if mirrored is None:
        yield
        return
    mirrored.pull()
    before = {name: _signature(run.path / name) for name in _files(run.path)}
    mirrored.claim()
    try:
        yield
    finally:
        mirrored.push([name for name in _files(run.path) if _signature(run.path / name) != before.get(name)])


def following(run: RunDirectory) -> Callable[[], None]:
    """Return a function that updates result.json, heartbeat and log.txt of a run, at most every two seconds."""
    mirrored = Mirrored.of(run, HASTY_SECONDS)
    last = -_REFRESH_SECONDS

    def follow() -> None:
        nonlocal last
        if mirrored is None or time.monotonic() - last < _REFRESH_SECONDS:
            return
        last = time.monotonic()
        files = mirrored.store.entries(recursive=False)
        if not _owned(mirrored.store, run.path, files):
            _copy(mirrored.store, run.path, {n: e for n, e in files.items() if n in (*FACTS, "log.txt")})

    return follow


def board(root: Path, command: list[str], say: Callable[[str], None]) -> int:
    """Run TensorBoard over the copy of a run root, and copy the changes of remote runs, until it exits."""

    def shown(name: str) -> bool:
        return name in FACTS or "events.out.tfevents" in name.rpartition("/")[2]

    refresh(root, shown)
    process = subprocess.Popen(command)
    reported = False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_BOARD_SECONDS)
            try:
                refresh(root, shown)
                reported = False
            except RunError as error:
                if not reported:
                    say(f"{error} It is tried again.")
                reported = True
    except KeyboardInterrupt:  # TensorBoard received the signal as well
        return process.wait()
    finally:
        process.terminate()


def _files(run: Path) -> list[str]:
    """Return the files of a run that the machine of rank 0 writes. The trials of a sweep are runs of their own."""
    found = []
    is_sweep = store_copies.is_sweep(run)
    for folder, folders, names in os.walk(run):
        relative = os.path.relpath(folder, run)
        if relative == ".":
            folders[:] = [name for name in folders if name != CHECKPOINTS and not is_sweep]
        for name in names:
            path = name if relative == "." else f"{relative}/{name}"
            if _is_own(path) and not HOST_LOG.fullmatch(path) and not os.path.islink(os.path.join(folder, name)):
                found.append(path)
    return sorted(found, key=lambda name: (name == RESULT, name))  # result.json last


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _content(path: Path) -> tuple[tuple[int, int, int] | None, bytes] | None:
    """Return a file's signature and, not older than that, its content; None where there is none."""
    signature = _signature(path)
    try:
        return None if signature is None else (signature, path.read_bytes())
    except OSError:
        return None


class Sync:
    """A thread that copies the files of a run to the store every few seconds, and checks there for `launch stop`.

    A large growing file is not sent repeatedly: its transfers take at most a twentieth of the time.

    Args:
        only: the files to send if this machine is not rank 0's; None: all except checkpoints.
    """

    def __init__(self, mirrored: Mirrored, only: Iterable[str] | None = None, every: float = SYNC_SECONDS) -> None:
        self._mirrored, self._every = mirrored, every
        self._only = None if only is None else list(only)
        self._sent: dict[str, tuple[int, int, int] | None] = {}
        self._not_before: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="launch-sync", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the remaining changes. StorageError if that fails after all retries."""
        self._ended.set()
        self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Send all changes of any size. StorageError if that fails after all retries."""
        with self._lock:
            self._send(everything=True)

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            # The store is unavailable for longer than the retries: the rest is sent later.
            with contextlib.suppress(StorageError, OSError):
                with self._lock:
                    self._send()
                if self._only is None and self._mirrored.stop_requested():
                    self._mirrored.run.request_stop()

    def _send(self, everything: bool = False) -> None:
        path = self._mirrored.run.path
        # The result from before the log is sent: a reader stops reading the log at a result in a final state.
        result = None if self._only is not None else _content(path / RESULT)
        for name in self._only if self._only is not None else _files(path):
            signature, began = _signature(path / name), time.monotonic()
            if signature is None or signature == self._sent.get(name):
                continue
            if not everything and began < self._not_before.get(name, 0.0):
                continue
            if name == RESULT:
                if result is not None and result[0] != self._sent.get(name):
                    self._mirrored.store.put_bytes(name, result[1])
                    self._sent[name] = result[0]
                continue
            with contextlib.suppress(FileNotFoundError):
                self._mirrored.store.put(name, path / name)
                self._sent[name] = signature
            now = time.monotonic()
            self._not_before[name] = now + 20 * (now - began)
