"""Standard streams that cannot end a command: a terminal, pipe or disk that goes away only silences the output.

A write then fails with EPIPE, EIO, ENOSPC or EBADF. A run must continue, because its results are in its directory.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


class QuietStream(io.TextIOBase):
    """A text stream that discards its output from the first failed write on.

    Args:
        stream: the stream to write to; None discards all output.

    Attributes:
        failure: the reason why output is discarded, None while the stream works.
        on_failure: called once with the reason.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: str | None = None
        self.on_failure: Callable[[str], None] = lambda reason: None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        if self._stream is None or self.failure is not None:
            return False
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self._stream is not None and self.failure is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller. The destructor of the base class calls this method as well."""

    def _fail(self, error: OSError | ValueError) -> None:
        self.failure = getattr(error, "strerror", None) or str(error)
        discard(self._stream)
        self.on_failure(self.failure)


def discard(stream: TextIO | None) -> None:
    """Redirect the descriptor of a standard stream to /dev/null, for this process and its later children."""
    if stream is None:
        return
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        if descriptor in (1, 2):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def open_standard() -> None:
    """Open the standard streams that the caller has closed as /dev/null.

    Otherwise a file of the run could get the descriptor of standard error, and `print` would fail.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def close_standard(status: int) -> int:
    """Flush the standard streams at the end of a command, and return its exit status.

    The status becomes 1 if a successful command could not write its standard output. A reader that has closed the
    pipe, such as `head`, is not an error.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        status = status or 1
        with suppress(OSError, ValueError):
            print(f"launch: Standard output cannot be written: {error}.", file=sys.stderr)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        discard(sys.stderr)
    return status


@contextmanager
def ignore_hangup() -> Iterator[None]:
    """Ignore SIGHUP within the block, so that a run continues when its terminal is closed."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def log_failure(log: Path, reason: str) -> None:
    """Write to log.txt of a run that its output is no longer shown. Does nothing if the log cannot be written."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    with suppress(OSError):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            os.write(
                descriptor,
                f"{stamp} [rank 0] The output can no longer be shown ({reason}); the run continues.\n".encode(),
            )
        finally:
            os.close(descriptor)
