"""Asynchronous saving of checkpoints during training."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.checkpoint import files
from launcher.errors import CheckpointError

# DCP and the modules that need it are imported by the first save: they take half a second (DTensor imports SymPy),
# which would delay the first step.
if TYPE_CHECKING:
    from launcher.engine.checkpoint.uploads import Uploads
    from launcher.engine.checkpoint.writer import CheckpointWriter, Part, Planner


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete and durable.

    Attributes:
        nbytes: bytes of the tensors of all ranks, on rank 0; 0 on other ranks.
        blocked: seconds for which `save` blocked the caller.
        seconds: duration of the save.
        note: error message if old checkpoints could not be deleted, or an empty string.
    """

    step: int
    path: Path
    nbytes: int
    blocked: float
    seconds: float
    note: str = ""


class Checkpointer:
    """Saves the checkpoints of one run to `directory` and deletes old ones.

    Every rank of the run has a Checkpointer and calls `save` at the same steps. Rank 0 of `group` coordinates and
    deletes. The constructor removes leftovers of interrupted saves; no other process may write to `directory` then.

    Args:
        keep: number of newest checkpoints to keep besides the best.
        group: a separate process group with a CPU backend (`dist.new_group(backend="gloo", timeout=…)`, with a timeout
            longer than a save), because collectives run in the background; None for a single process.
        uploads: if given, checkpoints are also uploaded to an object store in the background.

    Attributes:
        best: step of the best checkpoint, which is never deleted. The caller sets it.
        last: the newest `SavedCheckpoint`, or None.

    Raises:
        CheckpointError: `directory` cannot be created or cleaned.
        ValueError: `group` is None in a job of several processes.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 1,
        group: dist.ProcessGroup | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("a Checkpointer in a job of several processes needs a separate process group")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.best: int | None = None
        self.last: SavedCheckpoint | None = None
        self._group = group
        self._uploads = uploads
        self._rank = dist.get_rank(group) if group is not None else 0
        self._staging: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if self._rank == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                files.clean(self.directory)
            except OSError as error:
                raise CheckpointError(
                    f"Checkpoints cannot be written to {self.directory}: {error.strerror}."
                ) from error

    def save(self, step: int, state: dict[str, Any], own: Any = None, *, asynchronous: bool = True) -> None:
        """Save `state` and the `own` state of every rank as the checkpoint of `step`, replacing an existing one.

        Waits for the previous save, copies the tensors, and returns; a thread writes them to disk. The caller may
        change the tensors immediately.

        Args:
            state: a nest (see `nest`). Every rank saves its shard of DTensors; all other values are equal on all ranks,
                and rank 0 saves them.
            own: a nest that may differ between ranks. `load` returns a list over ranks.
            asynchronous: if False, return when the checkpoint is durable, and make no copy.

        Raises:
            CheckpointError: the save failed. Failures of the thread are raised by the next `save`, `wait` or `close`.
        """
        if bad := [key for key in state if not isinstance(key, str) or key == "own" or key.startswith("$")]:
            raise ValueError(f"the sections of a checkpoint cannot be called {bad}")
        start = time.perf_counter()
        self.wait()
        from launcher.engine.checkpoint import nest, writer

        shared, private = nest.Encoder(), nest.Encoder()
        skeleton = {key: shared.encode(value, str(key)) for key, value in state.items()}
        own_skeleton = private.encode(own, f"own/{self._rank}")
        # Of replicated tensors, rank 0 saves its own: buffers (batch statistics) may differ between ranks.
        saved = {name: one for name, one in shared.tensors.items() if self._rank == 0 or writer.is_sharded(one)}
        parts = [writer.part_of(name, tensor) for name, tensor in (*saved.items(), *private.tensors.items())]
        present = [part for part in parts if part is not None]
        devices = {part.source.device for part in present if part.source.is_cuda}
        if asynchronous:
            present = self._stage(present)
        for device in devices:
            # Wait for copies, or for computation if nothing is copied: the thread uses another stream.
            torch.cuda.current_stream(device).synchronize()
        scattered = self._uploads is not None and self._uploads.scattered
        destination = writer.CheckpointWriter(self.directory, step, skeleton if self._rank == 0 else None, scattered)
        planner = writer.Planner(present, own_skeleton)
        blocked = time.perf_counter() - start if asynchronous else None
        self._thread = threading.Thread(
            target=self._write,
            args=(step, destination, planner, start, blocked),
            name=f"checkpoint-{step}",
            daemon=True,
        )
        self._thread.start()
        if not asynchronous:
            self.wait()

    def wait(self) -> SavedCheckpoint | None:
        """Wait for the save in progress and return `last`.

        Raises:
            CheckpointError: the save failed. The failure is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.last

    def settle(self, seconds: float) -> None:
        """Wait at most `seconds` for the save in progress. A failure is raised by the next call of `wait`."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def busy(self) -> bool:
        """Whether a save is in progress, so that another one would wait."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Wait for the last save and free the staging memory.

        Raises:
            CheckpointError: the save failed.
            StorageError: the newest or the best checkpoint could not be uploaded.
        """
        self._staging = {}
        self.wait()
        if self._uploads is not None:
            self._uploads.flush()
            if self._rank == 0 and self.last is not None:
                files.prune(self.directory, self.last.step, self.best, self.keep)

    def newest(self) -> files.NewestCheckpoint:
        """Return the newest intact checkpoint on this machine or the object store; only for rank 0."""
        return files.newest_intact(self.directory) if self._uploads is None else self._uploads.newest()

    def local_copy(self, newest: files.NewestCheckpoint) -> files.NewestCheckpoint:
        """Return the checkpoint that rank 0 found, with its path on this machine, downloaded if it is not there."""
        return newest if self._uploads is None or self._rank == 0 else self._uploads.local_copy(newest)

    def _stage(self, parts: list[Part]) -> list[Part]:
        """Copy all sources to CPU memory that is reused by the next save."""
        buffers: dict[str, Tensor] = {}
        for part in parts:
            name, source = part.item.index.fqn, part.source
            buffer = self._staging.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            buffers[name] = buffer.copy_(source, non_blocking=source.is_cuda)
        self._staging = buffers
        return [replace(part, source=buffers[part.item.index.fqn]) for part in parts]

    def _write(
        self, step: int, writer: CheckpointWriter, planner: Planner, start: float, blocked: float | None
    ) -> None:
        from launcher.engine.checkpoint.collective_save import RanksFailed, describe_error, write

        try:
            write(writer, planner, self._group)
            path, pinned = self.directory / files.name_of(step), set()
            if self._uploads is not None:
                self._uploads.keep, self._uploads.best = self.keep, self.best
                self._uploads.submit(step, path, writer.temporary or path)
                pinned = self._uploads.pinned()
            note = files.prune(self.directory, step, self.best, self.keep, pinned) if self._rank == 0 else ""
            seconds = time.perf_counter() - start
            self.last = SavedCheckpoint(
                step, path, writer.nbytes, seconds if blocked is None else blocked, seconds, note
            )
        except BaseException as error:
            writer.discard()
            causes = error.causes if isinstance(error, RanksFailed) else {self._rank: describe_error(error)}
            self._failure = self._explain(step, causes)
            self._failure.__cause__ = error

    def _explain(self, step: int, causes: dict[int, str]) -> CheckpointError:
        rank, cause = min(causes.items())
        previous = f"the checkpoint {self.last.path} is intact" if self.last else "earlier checkpoints are intact"
        return CheckpointError(
            f"The checkpoint of step {step} could not be written to {self.directory}: rank {rank}: "
            f"{cause.rstrip('.')}; {previous}. Check that the disk has free space and that all workers run and share "
            "this directory, then continue with run.resume=true."
        )
