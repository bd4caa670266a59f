"""Environment, signal handlers, temporary directory and early imports of a process that starts or joins Ray."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


@contextlib.contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block. Variables that Ray sets in it (PYTHONBREAKPOINT) are reset, too."""
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
    """Restore the signal handlers after the block: Ray's native code installs one that prints a stack and exits."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def private_directory() -> Path:
    """Create a temporary directory with a short name that is accessible to this user only.

    The path of a Unix socket has at most 107 characters, of which Ray and `local.RAYS` use about 80.
    """
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="launch-", dir=root if len(root) <= 16 else "/tmp"))


def preload(modules: Sequence[str]) -> threading.Thread:
    """Import modules in a thread, while this process waits for Ray."""

    def load() -> None:
        for module in modules:
            with contextlib.suppress(ImportError):  # it is reported where the module is used
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="launch-preload", daemon=True)
    thread.start()
    return thread
