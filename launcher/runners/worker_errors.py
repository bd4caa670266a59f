"""Encodes an error of a worker as an event, which the driver decodes to the same error."""

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
    is_lost_peer,
    to_dict,
)

Event = dict[str, Any]


def describe(error: BaseException, rank: int) -> Event:
    """Return the event for an error of the worker `rank`.

    `aftermath` is true for an error that follows from the loss of another worker, `lost` for a worker that lost one of
    its own processes. In both cases the run is restarted.
    """
    lost = isinstance(error, LoaderLost)
    # A save that loses a peer raises a CheckpointError.
    follows = isinstance(error, (CheckpointError, RuntimeError, TimeoutError)) and is_lost_peer(str(error))
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
    """Return the error in an event of `describe`."""
    return from_dict(event["error"])


def _of_user(error: BaseException) -> UserCodeError:
    """Return an error of user code with its traceback, without the frames of this folder."""
    own = str(Path(__file__).resolve().parent)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(own)]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    lines += traceback.format_exception_only(type(error), error)
    return UserCodeError(f"{type(error).__name__}: {str(error) or type(error).__name__}", "".join(lines))


def crash_of(stderr: str) -> str:
    """Return the signal that Ray's crash handler wrote to a worker's standard error, or an empty string."""
    try:
        found = re.findall(r"\*\*\* (SIG[A-Z]+) received", Path(stderr).read_text(errors="replace"))
    except OSError:  # the worker ran on another machine
        return ""
    return found[-1] if found else ""
