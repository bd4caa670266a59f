"""What went wrong on a worker, as an event that travels to the driver and becomes the same error there."""

from __future__ import annotations

import re
import time
import traceback
from pathlib import Path
from typing import Any

from launcher import errors
from launcher.errors import LaunchError, LoaderLost, UserCodeError, WorkerLost

Event = dict[str, Any]

# What gloo, NCCL and the rendezvous store say when another rank has gone.
_PEER_IS_GONE = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|broken pipe|by peer|socket (?:timeout|closed)|recvvalue failed"
    r"|timed out (?:waiting|after)|wait timeout|nccl.*(?:remote|abort|unhandled system)",
    re.IGNORECASE,
)


def describe(error: BaseException, rank: int) -> Event:
    """Return the event for `error`.

    `aftermath` marks what only follows from the end of another worker, `lost` a worker that ends since one of its own
    processes died; after either the run is started again.
    """
    text = str(error) or type(error).__name__
    event: Event = {"kind": "error", "rank": rank, "time": time.time(), "setup": False, "aftermath": False}
    event["lost"] = isinstance(error, LoaderLost)
    if isinstance(error, LaunchError):
        return event | {
            "type": type(error).__name__,
            "message": text,
            "traceback": getattr(error, "traceback_text", ""),
            "setup": isinstance(error, errors.RequestError),
            "exit_status": error.exit_status,
            # A save in which a peer goes away is told as a save that failed.
            "aftermath": (isinstance(error, WorkerLost) and not event["lost"])
            or (isinstance(error, errors.CheckpointError) and bool(_PEER_IS_GONE.search(text))),
        }
    own = str(Path(__file__).resolve().parent)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(own)]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    lines += traceback.format_exception_only(type(error), error)
    return event | {
        "type": "UserCodeError",
        "message": f"{type(error).__name__}: {text}",
        "traceback": "".join(lines),
        "aftermath": isinstance(error, (RuntimeError, TimeoutError)) and bool(_PEER_IS_GONE.search(text)),
    }


def rebuild(event: Event) -> LaunchError:
    """Return the error that a worker described."""
    kind = getattr(errors, event["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, LaunchError)) or issubclass(kind, UserCodeError):
        return UserCodeError(event["message"], event.get("traceback", ""))
    error = kind(event["message"])
    # The engine turns a wrong request that shows only during training (a corrupt picture) from 2 to 1.
    error.exit_status = event.get("exit_status", error.exit_status)
    return error


def crash_of(stderr: str) -> str:
    """Return the signal that Ray's crash handler has written to a worker's standard error, or nothing."""
    try:
        found = re.findall(r"\*\*\* (SIG[A-Z]+) received", Path(stderr).read_text(errors="replace"))
    except OSError:  # the worker ran on another machine
        return ""
    return found[-1] if found else ""
