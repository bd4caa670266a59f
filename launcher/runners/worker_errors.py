"""What went wrong on a worker, as an event that travels to the driver and becomes the same error there."""

from __future__ import annotations

import re
import time
import traceback
from pathlib import Path
from typing import Any

from launcher.errors import (
    CheckpointError,
    LaunchError,
    LoaderLost,
    RequestError,
    UserCodeError,
    WorkerLost,
    from_dict,
    says_peer_is_gone,
    to_dict,
)

Event = dict[str, Any]


def describe(error: BaseException, rank: int) -> Event:
    """Return the event for `error`.

    `aftermath` marks what only follows from the end of another worker, `lost` a worker that ends since one of its own
    processes died; after either the run is started again.
    """
    lost = isinstance(error, LoaderLost)
    # A save in which a peer goes away is reported as a save that failed.
    follows = isinstance(error, (CheckpointError, RuntimeError, TimeoutError)) and says_peer_is_gone(str(error))
    return {
        "kind": "error",
        "rank": rank,
        "time": time.time(),
        "setup": isinstance(error, RequestError),
        "lost": lost,
        "aftermath": (isinstance(error, WorkerLost) and not lost) or follows,
        "error": to_dict(error if isinstance(error, LaunchError) else _of_user(error)),
    }


def rebuild(event: Event) -> LaunchError:
    """Return the error that a worker described."""
    return from_dict(event["error"])


def _of_user(error: BaseException) -> UserCodeError:
    """Return an exception that the engine has not translated, without the frames of this folder."""
    own = str(Path(__file__).resolve().parent)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(own)]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    lines += traceback.format_exception_only(type(error), error)
    return UserCodeError(f"{type(error).__name__}: {str(error) or type(error).__name__}", "".join(lines))


def crash_of(stderr: str) -> str:
    """Return the signal that Ray's crash handler has written to a worker's standard error, or nothing."""
    try:
        found = re.findall(r"\*\*\* (SIG[A-Z]+) received", Path(stderr).read_text(errors="replace"))
    except OSError:  # the worker ran on another machine
        return ""
    return found[-1] if found else ""
