"""Whose fault an exception is: the user's code, a lost peer, or ours."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from launcher.errors import LaunchError, UserCodeError, WorkerLost

_OURS = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)
# What gloo and NCCL say when the other side is gone. A rank that reports this is a victim, not the culprit.
_PEER_IS_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited or there was a network error",
    "application timeout caused pair closure",
    "timed out waiting",
    "collective operation timeout",
    "socket is no longer valid",
)


def translate(error: Exception) -> LaunchError:
    """Return the error of our tree that tells the user what happened.

    An exception of the user's code becomes a UserCodeError with the traceback from the user's first frame on; a broken
    collective a WorkerLost; a bug of ours a UserCodeError with the whole traceback, since there is nothing to hide.
    """
    if isinstance(error, LaunchError):
        return error
    text = str(error).lower()
    if isinstance(error, (RuntimeError, torch.distributed.DistError)) and any(sign in text for sign in _PEER_IS_GONE):
        return WorkerLost(
            f"The connection to another worker was lost ({str(error).splitlines()[0][:200]}). "
            "Look for the first error of the other workers; continue from the newest checkpoint with run.resume=true."
        )
    return UserCodeError(f"{type(error).__name__}: {error}", _traceback_of_user(error))


def _traceback_of_user(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if not _is_foreign(frame.filename)), None)
    if first is None:
        return "".join(traceback.format_exception(error))
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines)


def _is_foreign(filename: str) -> bool:
    return filename.startswith((_OURS, _TORCH, "<frozen"))
