"""A run on disk: its directory, `result.json`, heartbeat, requests to stop, and the listing of a run root.

Imports neither torch nor Ray, so that `launch runs` responds immediately. docs/architecture.md has the layout.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import masking
from launcher.config.checks import check_run_name
from launcher.errors import RunError, did_you_mean
from launcher.runs import plain_files, results, store_copies

HEARTBEAT_SECONDS = 5.0
# A run without a heartbeat for this time is lost. Long, because a long step or a slow save may delay the thread that
# writes the heartbeat.
LOST_AFTER_SECONDS = 60.0
FINAL = ("completed", "stopped", "pruned", "failed")
SENT = "sent"
REMOTE = "remote.json"  # in the directory of a remote run: its location


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old or the new file, never a part.

    If a full disk cannot hold both, the old file is overwritten, so that the failure of a run is still recorded.
    """
    try:
        plain_files.replace_text(path, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with plain_files.open_file(path, "r+") as file:
            file.write(text)
            file.truncate()


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run: `<run.root>/<run.name>`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def uri(self) -> str | None:
        """The URI of the run on an object store, or None."""
        root = store_copies.uri_of(self.path.parent)
        if root is None and store_copies.is_sweep(self.path.parent):
            root = RunDirectory(self.path.parent).uri
        return None if root is None else f"{root}/{self.name}"

    @property
    def root(self) -> str:
        """The run root as in run.root: a path, or a URI."""
        uri = self.uri
        return str(self.path.parent) if uri is None else uri.rpartition("/")[0]

    def display_path(self, path: Path | None = None) -> str:
        """Return the run, or a path below it, for display: its URI if it is on an object store."""
        uri = self.uri
        if uri is None:
            return str(path or self.path)
        return uri if path is None else f"{uri}/{path.relative_to(self.path).as_posix()}"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        return self.path / "overrides.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _result(self) -> Path:
        return self.path / "result.json"

    @property
    def _heartbeat(self) -> Path:
        return self.path / ".heartbeat"

    @property
    def _stop(self) -> Path:
        return self.path / ".stop"

    @property
    def is_sent(self) -> bool:
        """Whether it was sent to a cluster, whose head drives it (`launcher.jobs.remote.location`)."""
        return (self.path / REMOTE).is_file()

    @property
    def sent(self) -> RunDirectory | None:
        """The run or the sweep (for a trial) that was sent to a cluster; None for a local run."""
        return next((one for one in (self, RunDirectory(self.path.parent)) if one.is_sent), None)

    def _is_copied(self) -> bool:
        """Whether files of the run are copied from another machine at intervals, so that a silent run may still be
        active."""
        sent = self.sent
        try:
            return sent is not None and bool(plain_files.read_json(sent.path / REMOTE).get("directory"))
        except (OSError, ValueError, AttributeError):
            return False

    def exists(self) -> bool:
        return self.config.is_file() or self._result.is_file()

    def create(self) -> None:
        """Create the directory and verify that it is writable.

        Raises:
            RunError: it cannot be created or written.
        """
        probe = self.path / ".probe"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"x")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"The run directory {self.path} cannot be written: {error.strerror or error}. "
                "Choose another place with run.root=DIRECTORY."
            ) from error

    def result(self) -> dict[str, Any]:
        """Return the content of `result.json`, or an empty mapping if it does not exist."""
        try:
            content = plain_files.read_json(self._result)
        except FileNotFoundError:
            return {}
        except OSError as error:
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise RunError(f"{self._result} cannot be read: {why}. Restore it or remove the run.") from error
        except ValueError as error:
            raise RunError(f"{self._result} cannot be read: {error}. Restore it or remove the run.") from error
        if problem := results.problem_of(content):
            raise RunError(f"{self._result} cannot be used: {problem}. Restore it or remove the run.")
        return dict(content)

    def write_result(self, content: dict[str, Any]) -> None:
        if content.get("error"):
            content = {**content, "error": masking.hide(str(content["error"]))}
        write_json(self._result, content)

    def update_result(self, **changes: Any) -> dict[str, Any]:
        content = {**self.result(), **changes}
        self.write_result(content)
        return content

    def beat(self) -> None:
        """Record that this process is alive and owns the run."""
        write_json(self._heartbeat, {"host": socket.gethostname(), "pid": os.getpid()})

    def is_alive(self) -> bool:
        """Return whether a process owns the run: a recent heartbeat, of a process that is not known to have exited."""
        try:
            age = time.time() - self._heartbeat.stat().st_mtime
            writer = plain_files.read_json(self._heartbeat)
            pid = int(writer.get("pid", 0))
        except (OSError, ValueError, TypeError, AttributeError, OverflowError):
            return False
        if writer.get("host") == socket.gethostname() and not _process_exists(pid):
            return False
        return age < LOST_AFTER_SECONDS

    def require_idle(self) -> None:
        """Raise RunError if a process owns the run."""
        if self.status() == "running":
            raise RunError(
                f'The run "{self.name}" is running. Follow it with: launch logs {self.name}; stop it with: launch stop '
                f"{self.name}."
            )

    def claim(self) -> None:
        """Take ownership of a run that is resumed: of several simultaneous commands only one succeeds.

        The lock is held only during this call, and is released when its process exits; afterwards the heartbeat
        identifies the owner, so that neither a dead process nor another machine blocks the run forever.

        Raises:
            RunError: another process owns it.
        """
        with _locked(self.config):
            self.require_idle()
            self.beat()
            self.update_result(status="running")

    def request_stop(self) -> None:
        with plain_files.open_file(self._stop, "a"):
            pass

    def stop_requested(self) -> bool:
        return self._stop.exists()

    def clear_requests(self) -> None:
        with suppress(FileNotFoundError):
            self._stop.unlink()

    def status(self) -> str:
        """Return the status of `result.json`, or `lost` if it is running and no process owns it.

        `sent`: it was sent to a cluster, and no recent files were copied back; the cluster has the current state
        (`launcher.jobs.remote.states`).
        """
        status = str(self.result().get("status") or (SENT if self.is_sent else "unknown"))
        if status == "running" and self._is_copied() and not self.is_alive():
            return SENT
        return "lost" if status == "running" and not self.is_alive() else status


@contextmanager
def _locked(file: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold a file's lock, if its file system supports locks and no dead process of another machine holds it."""
    import fcntl

    latest = time.monotonic() + patience
    with plain_files.open_file(file, "r+") as held:
        while time.monotonic() < latest:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # for example a mounted object store
                break
        yield


def _process_exists(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:  # no process has such a number
        return False
    return True


def find(root: str | Path, name: str) -> RunDirectory:
    """Return the run called `name` (a run, SWEEP/NUMBER or SWEEP/best) under `root`.

    Raises:
        ConfigError: the name is invalid.
        RunError: the run does not exist; the message suggests similar names.
    """
    for part in name.split("/"):
        check_run_name(part, "the name of a run")
    base = Path(root).expanduser().absolute()
    plain_files.check_directory(base / name.partition("/")[0])
    sweep, _, last = name.rpartition("/")
    run = RunDirectory(base / sweep / _best_of(base / sweep, sweep) if sweep and last == "best" else base / name)
    if sweep and last.isdecimal() and not run.exists():
        run = RunDirectory(base / sweep / str(int(last)))  # TensorBoard displays trial 7 as 007
    if not run.exists() and not run.is_sent:
        known = [other.name for other in list_runs(root)]
        listed = f" It holds {len(known)} run(s)." if known else " It holds no runs."
        raise RunError(
            f'There is no run "{name}" in {RunDirectory(base / "run").root}.{listed}{did_you_mean(name, known)}'
        )
    return run


def list_runs(root: str | Path) -> Iterator[RunDirectory]:
    """Yield the runs under `root`, oldest first, including unreadable runs and links to directories."""
    base = Path(root).expanduser().absolute()
    if not base.is_dir():
        return
    runs = [RunDirectory(path) for path in base.iterdir() if not path.name.startswith(".") and _looks_like_a_run(path)]
    yield from sorted(runs, key=lambda run: (_begun(run), run.name))


def _looks_like_a_run(path: Path) -> bool:
    try:
        if not path.is_dir():
            return False
        return path.is_symlink() or not {"config.yaml", "result.json", REMOTE}.isdisjoint(os.listdir(path))
    except OSError:
        return True


def _best_of(sweep: Path, name: str) -> str:
    """Return the number of a sweep's best trial."""
    try:
        found = re.search(r"^number: (\d{1,9})$", plain_files.read_text(sweep / "best.yaml"), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        what = "no trial of it has been completed" if (sweep / "study.journal").exists() else f'"{name}" is no sweep'
        raise RunError(f"{name}/best: {what}. `launch runs` lists what there is.")
    return found[1]


def _begun(run: RunDirectory) -> float:
    """Return the time when the run was started, or resumed last."""
    with suppress(OSError):
        return run.config.lstat().st_mtime
    return 0.0
