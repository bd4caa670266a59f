"""Captures the output of the user's code: it is written to log.txt, and passed to the display as events."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from launcher.config import masking
from launcher.engine.control import Control


class ConsoleLog:
    """log.txt, to which all ranks append lines. O_APPEND makes each write atomic.

    If the file cannot be opened (for example, the run belongs to another user), nothing is written.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        self._hide = masking.hider()
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

    def line(self, text: str) -> str:
        """Write a line, with secrets replaced by ***. Return the line as it was written."""
        text = self._hide(text)
        if self._file is None:
            return text
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        with suppress(OSError):  # a full disk must not turn the user's print into an error
            os.write(self._file, f"{stamp} [rank {self._rank}] {text}\n".encode(errors="replace"))
        return text

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class CapturedStream(io.TextIOBase):
    """A text stream that replaces standard output and error while the user's code runs.

    Args:
        on_text: called with each line and True, and with each incomplete line that is flushed (a prompt) and False.
    """

    def __init__(self, on_text: Callable[[str, bool], None]) -> None:
        self._on_text = on_text
        self._buffer = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    @property
    def buffer(self) -> io.RawIOBase:
        """The binary stream, for code that writes bytes."""
        return _Bytes(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._buffer = (self._buffer + text).split("\n")
            for line in lines:
                # A progress bar separates its states with carriage returns: only the last state is a line.
                self._on_text(line.rsplit("\r", 1)[-1] if "\r" in line.rstrip("\r") else line.rstrip("\r"), True)
        return len(text)

    def finish(self) -> None:
        """Pass on an incomplete last line."""
        with self._lock:
            if self._buffer:
                self.write("\n")

    def flush(self) -> None:
        with self._lock:
            if self._buffer and "\r" not in self._buffer:
                self._on_text(self._buffer, False)
                self._buffer = ""


class _ProcessStream(CapturedStream):
    """The stream that replaces standard output and error of this process in every capture.

    A logging handler keeps a reference to the stream that it was created with. With one stream per process, a handler
    that was created during the start check writes to the run's output once the run has started.
    """

    def __init__(self) -> None:
        super().__init__(self._pass_on)
        self.receivers: list[Callable[[str, bool], None]] = []

    def _pass_on(self, text: str, whole: bool) -> None:
        if self.receivers:
            self.receivers[-1](text, whole)
            return
        stream = sys.__stderr__ if sys.stderr is cast(Any, self) else sys.stderr
        if stream is not None:
            with suppress(OSError, ValueError):  # a closed terminal must not turn the user's print into an error
                stream.write(text + ("\n" if whole else ""))
                stream.flush()


_process_stream = _ProcessStream()


@contextmanager
def capture_output(on_text: Callable[[str, bool], None]) -> Iterator[None]:
    """Pass everything that is written to `sys.stdout` and `sys.stderr` to `on_text`; see `CapturedStream`."""
    original = sys.stdout, sys.stderr
    _process_stream.receivers.append(on_text)
    sys.stdout = sys.stderr = cast(Any, _process_stream)
    try:
        yield
    finally:
        _process_stream.finish()
        _process_stream.receivers.pop()
        sys.stdout, sys.stderr = original


class _Bytes(io.RawIOBase):
    def __init__(self, text: CapturedStream) -> None:
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._text.write(bytes(data).decode(errors="replace"))
        return len(data)


class Console:
    """Captures `sys.stdout` and `sys.stderr` of this process during a run; a context manager."""

    def __init__(self, path: Path, rank: int, control: Control) -> None:
        self._log = ConsoleLog(path, rank)
        self._rank = rank
        self._control = control
        self._process = os.getpid()

    def __enter__(self) -> Console:
        self._capture = capture_output(self._show)
        self._capture.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._capture.__exit__(None, None, None)
        self._log.close()

    def _show(self, text: str, whole: bool) -> None:
        if text:
            text = self._log.line(text)
        if os.getpid() != self._process:
            # A forked loader process: its events would be lost, and a lock may have been held during the fork.
            with suppress(OSError):  # as above
                os.write(2, (text + ("\n" if whole else "")).encode(errors="replace"))
            return
        self._control.emit({"kind": "line", "rank": self._rank, "text": text, "whole": whole})

    def note(self, text: str) -> None:
        """Write a line of the engine to log.txt."""
        self._log.line(text)
