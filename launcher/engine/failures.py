"""Classifies an exception: raised by the user's code, caused by a lost peer, or a bug of launch."""

from __future__ import annotations

import errno
import signal
import traceback
from pathlib import Path

import torch

from launcher.errors import LaunchError, LoaderLost, TrainingError, UserCodeError, WorkerLost, is_lost_peer

_OURS = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)
_PYTHON = str(Path(traceback.__file__).resolve().parent)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_REMEDIES: dict[int, str] = {
    signal.SIGKILL: "usually out of memory): lower data.num_workers, or the memory use of the data set",
    signal.SIGBUS: "usually out of shared memory): enlarge /dev/shm (docker run --shm-size), or lower data.num_workers",
}


def translate(error: Exception, rank: int = 0) -> LaunchError:
    """Return the LaunchError that reports an exception of `rank` to the user.

    An exception of the user's code becomes a UserCodeError with the traceback from the user's first frame on, a failed
    collective a WorkerLost, and a bug of launch a UserCodeError with the full traceback.
    """
    if isinstance(error, LaunchError):
        return error
    if isinstance(error, LoaderDied):
        return error.of_rank(rank)
    if isinstance(error, (RuntimeError, torch.distributed.DistError)) and is_lost_peer(str(error)):
        return WorkerLost(
            f"The connection to another worker was lost ({str(error).splitlines()[0][:200]}). "
            "Look for the first error of the other workers; continue from the newest checkpoint with run.resume=true."
        )
    if isinstance(error, OSError) and error.errno in _DISK and _first_of_user(error) is None:
        where = f" ({error.filename})" if error.filename else ""
        return TrainingError(
            f"The run's files cannot be written: {error.strerror}{where}. Free disk space or choose another run.root, "
            "then continue from the newest checkpoint with run.resume=true."
        )
    return UserCodeError(f"{type(error).__name__}: {error}", traceback_of_user(error))


class LoaderDied(RuntimeError):
    """A loader process exited with `status`, which is negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a loader process ended with status {status}")
        self.status = status

    def of_rank(self, rank: int) -> LoaderLost:
        """Return the error that reports the death of a loader process of `rank`."""
        process = f"A loader process of rank {rank}"
        if self.status >= 0:
            return LoaderLost(
                f"{process} exited with status {self.status} while reading data. Use data.num_workers=0 to see the "
                "cause."
            )
        remedy = _REMEDIES.get(-self.status, "a crash in native code): use data.num_workers=0 to see the cause")
        return LoaderLost(f"{process} was killed (signal {-self.status}, {remedy}.")


def traceback_of_user(error: Exception) -> str:
    """Return the traceback from the first frame of the user's code on, or the full traceback if there is none."""
    first = _first_of_user(error)
    if first is None:
        return "".join(traceback.format_exception(error))
    lines = traceback.format_list(traceback.extract_tb(error.__traceback__)[first:]) + traceback.format_exception_only(
        error
    )
    return "Traceback (most recent call last):\n" + "".join(lines)


def _first_of_user(error: Exception) -> int | None:
    frames = traceback.extract_tb(error.__traceback__)
    return next((i for i, frame in enumerate(frames) if not is_foreign(frame.filename)), None)


def is_raised_by_user(error: Exception) -> bool:
    """Whether a `raise` statement of the user's code raised the error, so that its text is addressed to the user."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return bool(last) and not is_foreign(last[0].filename) and (last[0].line or "raise ").startswith("raise ")


def is_foreign(filename: str) -> bool:
    """Whether a source file belongs to launch, PyTorch or Python, and not to the user."""
    of_python = filename.startswith(_PYTHON) and "-packages" not in filename.removeprefix(_PYTHON)
    return of_python or filename.startswith((_OURS, _TORCH, "<frozen"))
