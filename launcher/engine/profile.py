"""A trace of chosen steps (`logging.profile=[10,15]`), by PyTorch's profiler.

One file a rank in the folder `profile` of the run, in the trace format of Chrome: https://ui.perfetto.dev and
chrome://tracing open it, and TensorBoard with the plugin torch-tb-profiler, which looks for `*.pt.trace.json.gz`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.engine.runtime import Runtime


class StepTrace:
    """Records the steps from the first to the last one, both included; nothing for None.

    Args:
        steps: [first, last], counted from 1.
        directory: the run's directory.
        note: takes a line for the user when rank 0's trace is written.
    """

    def __init__(
        self, steps: Sequence[int] | None, directory: Path, runtime: Runtime, note: Callable[[str], None]
    ) -> None:
        self._steps = tuple(steps) if steps else None
        self._runtime, self._note = runtime, note
        self._path = directory / "profile" / f"rank{runtime.rank}.pt.trace.json.gz"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before every step."""
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
        from torch.profiler import ProfilerAction, ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # With a schedule each step is a span ProfilerStep#N, by which viewers find their way.
        self._profiler = profile(activities=activities, schedule=lambda _: ProfilerAction.RECORD, record_shapes=True)
        self._profiler.step_num = step
        self._profiler.start()

    def close(self) -> None:
        """Write what has been recorded."""
        profiler, self._profiler = self._profiler, None
        self._steps = None
        if profiler is None:
            return
        profiler.stop()
        self._path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
        if self._runtime.is_first:
            folder = self._path.parent
            self._note(f"The trace of the chosen steps is in {folder}: open a file of it in https://ui.perfetto.dev.")
