"""Ray as a process of ours needs it: its environment, its signals, and what `ray.init` has no options for."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the length of the block; what Ray sets meanwhile (PYTHONBREAKPOINT) is taken back as well."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def preserved_signal_handlers() -> Iterator[None]:
    """Give the signals back to who had them: Ray's native part takes SIGTERM, to print its stack and die."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def private_directory() -> Path:
    """Make a directory that this user alone can enter, with a short name.

    The path of a Unix socket holds 107 characters, and what Ray and `local.RAYS` add takes about 80.
    """
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="launch-", dir=root if len(root) <= 16 else "/tmp"))
