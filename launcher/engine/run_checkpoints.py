"""Manages the checkpoints of a run: restores the newest one, saves, and reports the last good one."""

from __future__ import annotations

from contextlib import suppress

from launcher.engine.checkpoint import Checkpointer, NewestCheckpoint, SavedCheckpoint
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.control import Control
from launcher.engine.progress import Progress
from launcher.engine.record import StepFile
from launcher.engine.runtime import Runtime
from launcher.engine.schedules import Schedule
from launcher.engine.state import State
from launcher.errors import CheckpointError
from launcher.runs import RunDirectory

SETTLE_SECONDS = 60.0  # time that a failing run waits for the current save; other ranks may be lost


class RunCheckpoints:
    """Saves and restores the state of one run. Every rank has one and calls its methods at the same steps.

    Args:
        keep: number of checkpoints to keep besides the best.
        uploads: where checkpoints are sent, when the run root is an object store.

    Attributes:
        saved_step: the step that was last saved or restored.
    """

    def __init__(
        self,
        state: State,
        progress: Progress,
        schedule: Schedule,
        runtime: Runtime,
        directory: RunDirectory,
        control: Control,
        keep: int,
        uploads: Uploads | None = None,
    ) -> None:
        self._state, self._progress, self._schedule = state, progress, schedule
        self._runtime, self._directory, self._control = runtime, directory, control
        self._checkpointer = Checkpointer(
            directory.checkpoints, keep=keep, group=runtime.new_host_group(), uploads=uploads
        )
        self.saved_step: int | None = None

    @property
    def last(self) -> SavedCheckpoint | None:
        """The newest checkpoint that this process has saved, or None."""
        return self._checkpointer.last

    def save(self) -> None:
        """Save the current step, in the background."""
        self._checkpointer.wait()  # the previous save still deletes checkpoints by the previous `best`
        self._checkpointer.best = self._progress.best_step
        self._checkpointer.save(self._progress.step, *self._state.collect())
        self.saved_step = self._progress.step

    def wait(self) -> SavedCheckpoint | None:
        """Wait until the current save is durable.

        Raises:
            CheckpointError: it could not be written.
        """
        return self._checkpointer.wait()

    def settle(self) -> None:
        """Wait for the current save of a failing run, at most SETTLE_SECONDS: it is the last good checkpoint."""
        self._checkpointer.settle(SETTLE_SECONDS)

    def close(self) -> None:
        self._checkpointer.close()

    def newest(self) -> NewestCheckpoint:
        """Return the newest intact checkpoint, on every rank."""
        with suppress(CheckpointError):  # `wait` raises the error of a failed save; here only intact ones matter
            self._checkpointer.wait()
        found = self._runtime.broadcast(self.newest_here().to_dict() if self._runtime.is_first else None)
        return self._checkpointer.local_copy(NewestCheckpoint.from_dict(found))

    def newest_here(self) -> NewestCheckpoint:
        """Return the newest intact checkpoint that this rank sees."""
        return self._checkpointer.newest()

    def describe_newest(self) -> str:
        """Return the part of an error message that names the last good checkpoint. A collective."""
        newest = self.newest()
        return f"the last good checkpoint is {newest.path}" if newest.path else "there is no checkpoint yet"

    # ---- continuing -------------------------------------------------------------------------------------------------

    def resume(self) -> int | None:
        """Restore the newest intact checkpoint, if there is one.

        Returns:
            The step that rank 0's record continues from: 0 if the run was lost before its first checkpoint, None for a
            new run.
        """
        newest = self.newest()
        if newest.path is not None:
            self._state.load(newest.path)
            self.saved_step = self._progress.step
        else:
            self._state.seed_rank()
        continues = self._runtime.is_first and self._note_restart(newest)
        self._progress.joined(self._runtime.world_size)
        if not continues:
            return self.saved_step
        counters = ("restarts", "preemptions", "lost_steps", "world_sizes")
        self._directory.update_result(**{name: getattr(self._progress, name) for name in counters})
        return self._progress.step

    def _note_restart(self, newest: NewestCheckpoint) -> bool:
        """Count and report the steps lost in a restart. Return False for a new run."""
        progress = self._progress
        file = StepFile(self._directory.path)
        steps_done = file.read()
        file.close()
        if newest.path is None and not newest.skipped and not steps_done and self._runtime.attempt == 1:
            return False
        lost = max(0, steps_done - progress.step)
        # The counts of restarts after that checkpoint are in result.json only.
        earlier = self._directory.result()
        for name, causes in (("restarts", ("", "failure")), ("preemptions", ("preemption",))):
            before = max(getattr(progress, name), earlier.get(name) or 0)
            setattr(progress, name, before + (self._runtime.cause in causes))
        progress.lost_steps = max(progress.lost_steps, earlier.get("lost_steps") or 0) + lost
        progress.world_sizes = max(progress.world_sizes, list(earlier.get("world_sizes") or []), key=len)
        repeated = f"; {lost} step(s) after it are repeated" if lost else ""
        sentences = (f"Continuing from step {progress.step}{repeated}.", newest.explain(), self._schedule.note)
        text = " ".join(sentence for sentence in sentences if sentence)
        self._control.emit({"kind": "note", "text": text})
        self._control.emit({"kind": "resumed", "step": progress.step})
        return True
