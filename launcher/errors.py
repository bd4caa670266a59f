"""Everything that can go wrong, as one tree.

    LaunchError                    the base: a message for the user, and the exit status of the command line
    ├── RequestError      (exit 2) what was asked is wrong or cannot be met; nothing was started
    │   ├── ConfigError            a key, a value or a word on the command line
    │   ├── DataError              a data set: missing, empty, cut short, corrupt
    │   ├── ClusterError           a cluster that cannot be reached, or whose nodes differ from this process
    │   │   └── HostError          one of its hosts: no SSH connection, or a command failed there
    │   ├── RayVersionError        the installed Ray lacks a part that launch adapts
    │   ├── ResourceError          more workers, GPUs or memory than there can ever be
    │   ├── TrustError             a `_target_` outside the allow-list or of the wrong kind
    │   └── RunError               a run that does not exist, exists already, or cannot be continued
    ├── MachineError      (exit 1) machines were asked for and did not come, or do not go
    └── TrainingError     (exit 1) the run started and failed
        ├── NonFiniteLoss          the loss became NaN or infinite
        ├── CheckpointError        a checkpoint cannot be written or read
        ├── ExportError            the network cannot be written as an exported program
        ├── StorageError           an object store cannot be read or written
        ├── WorkerLost             a worker process died or stopped answering
        │   ├── OutOfMemory        it was ended, since its machine had no memory left
        │   └── LoaderLost         one of its loader processes died
        ├── Regroup                the workers have saved and ended, to be started again (never told to the user)
        └── UserCodeError          the user's own code raised; carries the user's traceback

A message says what was asked, what was found, and what to do next, in one paragraph and without secrets.
Interruption is not an error: `Stopped` carries the signal, and the command line turns it into 130 or 143.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any


class LaunchError(Exception):
    """Base of all errors that are told to the user in one paragraph, without a traceback."""

    exit_status = 1


class RequestError(LaunchError):
    exit_status = 2


class ConfigError(RequestError):
    pass


class DataError(RequestError):
    pass


class ClusterError(RequestError):
    pass


class HostError(ClusterError):
    """One host cannot be reached, or cannot do what it has to.

    Attributes:
        host: what the user calls it.
        cause: one word: closed, dead, key, unknown, changed, name, settings, lost, time, rsync, failed.
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
    """Machines: something was created, or begun to go, and it did not end well."""


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
    """A worker was ended since the memory of its machine was nearly used up: tried again, it would be again."""


class LoaderLost(WorkerLost):
    """A process that reads data for a worker died. The worker itself is alive, and ends with this error."""


class Regroup(TrainingError):
    """All ranks have saved at the same step and ended, as they were asked to: a new group of workers continues."""


class UserCodeError(TrainingError):
    """The user's model, data set or callback raised.

    `traceback_text` is the traceback of the user's own frames, printed once and as it is.
    """

    def __init__(self, message: str, traceback_text: str) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[type[UserCodeError], tuple[str, str]]:
        return type(self), (str(self), self.traceback_text)


class Stopped(BaseException):
    """Raised where a run ends because somebody asked for it at once (a second Ctrl-C)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


# What an error holds beside its message, by the names of the arguments of its class.
_DATA: dict[type[LaunchError], tuple[str, ...]] = {HostError: ("host", "cause"), UserCodeError: ("traceback_text",)}


def to_dict(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data for another process: the one form on every wire.

    A class of another module becomes its base in this one; an exception that is no LaunchError becomes a UserCodeError
    with its whole traceback.
    """
    if not isinstance(error, LaunchError):
        text = str(error) or type(error).__name__
        error = UserCodeError(f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)))
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    data = {name: getattr(error, name) for base, names in _DATA.items() if issubclass(kind, base) for name in names}
    return {"type": kind.__name__, "message": str(error), "data": data, "exit_status": error.exit_status}


def from_dict(found: Mapping[str, Any]) -> LaunchError:
    """Return the error that `to_dict` described: the same class, message, data and exit status."""
    kind = globals().get(str(found["type"]))
    if not (isinstance(kind, type) and issubclass(kind, LaunchError)):
        kind = LaunchError
    names = [name for base, names in _DATA.items() if issubclass(kind, base) for name in names]
    given = found.get("data", {})
    error = kind(str(found["message"]), *(str(given.get(name, "")) for name in names))
    error.exit_status = int(found.get("exit_status", kind.exit_status))
    return error


# What gloo, NCCL and the rendezvous store say where another worker has gone. A worker that reports it is a victim.
_PEER_IS_GONE = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|broken pipe|(?:closed|reset) by peer|recvvalue failed"
    r"|socket (?:timeout|closed|is no longer valid)|application timeout caused pair closure"
    r"|remote process exited or there was a network error|timed out (?:waiting|after \d+ ?(?:ms|seconds) waiting)"
    r"|wait timeout after|collective operation timeout|nccl.*(?:remote|abort|unhandled system)",
    re.IGNORECASE,
)


def says_peer_is_gone(text: str) -> bool:
    """Whether the text of an exception says that the process at the other end of a connection has gone."""
    return bool(_PEER_IS_GONE.search(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "nearest"?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
