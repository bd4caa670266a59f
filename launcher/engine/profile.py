"""Traces selected steps with PyTorch's profiler (`logging.profile=[10,15]`).

Each rank writes one file to the folder `profile` of the run, in Chrome's trace format. https://ui.perfetto.dev,
chrome://tracing, and TensorBoard with the plugin torch-tb-profiler (which needs the suffix `.pt.trace.json.gz`) open
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerAction, ProfilerActivity, profile

from launcher.engine.runtime import Runtime


class StepTrace:
    """Traces the steps [first, last], inclusive; traces nothing if `steps` is None.

    Args:
        steps: [first, last], counted from 1.
        directory: the run's directory.
        note: called with a line for the user when rank 0's trace has been written.
    """

    def __init__(
        self, steps: Sequence[int] | None, directory: Path, runtime: Runtime, note: Callable[[str], None]
    ) -> None:
        self._steps = tuple(steps) if steps else None
        self._runtime, self._note = runtime, note
        self._path = directory / "profile" / f"rank{runtime.rank}.pt.trace.json.gz"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start, continue or end the trace; call it before every step."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self.close()
        elif self._profiler is not None:
            self._profiler.step()
        elif step >= first:
            self._start(step)

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # With a schedule, each step is a span ProfilerStep#N in viewers.
        self._profiler = profile(activities=activities, schedule=lambda _: ProfilerAction.RECORD, record_shapes=True)
        self._profiler.step_num = step
        self._profiler.start()

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        profiler, self._profiler = self._profiler, None
        self._steps = None
        if profiler is None:
            return
        profiler.stop()
        self._path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
        if self._runtime.is_first:
            folder = self._path.parent
            self._note(f"The trace of steps is in {folder}. Open its files in https://ui.perfetto.dev.")
