"""The exceptions of launch, and their format on the wire.

    LaunchError                    the base: a message for the user, and the exit status of the command line
    ├── RequestError      (exit 2) the request is wrong or cannot be met; nothing was started
    │   ├── ConfigError            a key, a value or a word on the command line
    │   ├── DataError              a data set: missing, empty, truncated, corrupt
    │   ├── ClusterError           a cluster that cannot be reached, or whose nodes differ from this process
    │   │   └── HostError          one of its hosts: no SSH connection, or a command failed there
    │   ├── RayVersionError        the installed Ray lacks a part that launch adapts
    │   ├── ResourceError          more workers, GPUs or memory than the machines have
    │   ├── TrustError             a `_target_` outside the allow-list or of the wrong kind
    │   └── RunError               a run that does not exist, exists already, or cannot be continued
    ├── MachineError      (exit 1) machines could not be created or removed
    └── TrainingError     (exit 1) the run started and failed
        ├── NonFiniteLoss          the loss became NaN or infinite
        ├── CheckpointError        a checkpoint cannot be written or read
        ├── ExportError            the network cannot be written as an exported program
        ├── StorageError           an object store cannot be read or written
        ├── WorkerLost             a worker process died or stopped answering
        │   ├── OutOfMemory        it was killed because its machine ran out of memory
        │   └── LoaderLost         one of its loader processes died
        ├── Regroup                all workers saved a checkpoint and exited, to be restarted (never shown to users)
        └── UserCodeError          the user's own code raised; carries the user's traceback

A message states what was requested, what was found and how to fix it, in one paragraph and without secrets.
An interruption is not an error: `Stopped` carries the signal, and the command line turns it into 130 or 143.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any


class LaunchError(Exception):
    """Base of all errors that are reported to the user in one paragraph, without a traceback."""

    exit_status = 1


class RequestError(LaunchError):
    exit_status = 2


class ConfigError(RequestError):
    """The configuration is invalid.

    Attributes:
        key: the configuration key, or the word of the command line, that is invalid; empty if it is not a single one.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str]]:
        return type(self), (str(self), self.key)


class DataError(RequestError):
    pass


class ClusterError(RequestError):
    pass


class HostError(ClusterError):
    """A host cannot be reached, or a command failed on it.

    Attributes:
        host: its name as the user wrote it.
        cause: closed, dead, key, unknown, changed, name, settings, jump, client, lost, shell, time, rsync or failed;
            no-rsync or no-ssh if this machine lacks the program.
    """

    def __init__(self, message: str, host: str, cause: str) -> None:
        super().__init__(message)
        self.host = host
        self.cause = cause

    def __reduce__(self) -> tuple[type[HostError], tuple[str, str, str]]:
        return type(self), (str(self), self.host, self.cause)


class RayVersionError(RequestError):
    pass


class ResourceError(RequestError):
    pass


class TrustError(RequestError):
    pass


class RunError(RequestError):
    pass


class MachineError(LaunchError):
    """Machines could not be created or removed, and some may exist."""


class TrainingError(LaunchError):
    pass


class NonFiniteLoss(TrainingError):
    pass


class CheckpointError(TrainingError):
    pass


class ExportError(TrainingError):
    pass


class StorageError(TrainingError):
    pass


class WorkerLost(TrainingError):
    pass


class OutOfMemory(WorkerLost):
    """A worker was killed because its machine ran out of memory. A restart would fail in the same way."""


class LoaderLost(WorkerLost):
    """A data loader process of a worker died. The worker itself is alive and exits with this error."""


class Regroup(TrainingError):
    """All ranks saved a checkpoint at the same step and exited as requested. A new group of workers continues."""


class UserCodeError(TrainingError):
    """The user's model, data set or callback raised.

    `traceback_text` is the traceback of the user's own frames, which is printed once.
    """

    def __init__(self, message: str, traceback_text: str) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[type[UserCodeError], tuple[str, str]]:
        return type(self), (str(self), self.traceback_text)


class Stopped(BaseException):
    """Raised when a signal ends a run at once, without a checkpoint (a second Ctrl-C)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


# The data of an error besides its message: the names of the other arguments of its class.
_DATA: dict[type[LaunchError], tuple[str, ...]] = {
    ConfigError: ("key",),
    HostError: ("host", "cause"),
    UserCodeError: ("traceback_text",),
}


def to_dict(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data, to be sent to another process.

    An error class of another module is replaced by its base class in this module. An exception that is not a
    LaunchError becomes a UserCodeError with its whole traceback.
    """
    if not isinstance(error, LaunchError):
        text = str(error) or type(error).__name__
        error = UserCodeError(f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)))
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    data = {name: getattr(error, name) for base, names in _DATA.items() if issubclass(kind, base) for name in names}
    return {"type": kind.__name__, "message": str(error), "data": data, "exit_status": error.exit_status}


def from_dict(found: Mapping[str, Any]) -> LaunchError:
    """Return the error that was encoded by `to_dict`, with the same class, message, data and exit status."""
    kind = globals().get(str(found["type"]))
    if not (isinstance(kind, type) and issubclass(kind, LaunchError)):
        kind = LaunchError
    names = [name for base, names in _DATA.items() if issubclass(kind, base) for name in names]
    given = found.get("data", {})
    error = kind(str(found["message"]), *(str(given.get(name, "")) for name in names))
    error.exit_status = int(found.get("exit_status", kind.exit_status))
    return error


# Messages of gloo, NCCL and the rendezvous store for a lost connection to another worker. The worker that reports one
# is not the cause of the failure.
_PEER_IS_GONE = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|broken pipe|(?:closed|reset) by peer|recvvalue failed"
    r"|socket (?:timeout|closed|is no longer valid)|application timeout caused pair closure"
    r"|remote process exited or there was a network error|timed out (?:waiting|after \d+ ?(?:ms|seconds) waiting)"
    r"|wait timeout after|collective operation timeout|nccl.*(?:remote|abort|unhandled system)",
    re.IGNORECASE,
)


def is_lost_peer(text: str) -> bool:
    """Return whether the text of an exception reports a lost connection to another process."""
    return bool(_PEER_IS_GONE.search(text))


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's text, or the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "nearest"?`, or an empty string if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
