"""A trace of chosen steps (`logging.profile=[10,15]`), by PyTorch's profiler.

One file a rank in the folder `profile` of the run, in the trace format of Chrome: https://ui.perfetto.dev and
chrome://tracing open it, and TensorBoard with the plugin torch-tb-profiler, which looks for `*.pt.trace.json.gz`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.engine.runtime import Runtime


class StepTrace:
    """Records the steps from the first to the last one, both included; nothing for None.

    Args:
        steps: [first, last], counted from 1.
        directory: the run's directory.
    """

    def __init__(self, steps: Sequence[int] | None, directory: Path, runtime: Runtime) -> None:
        self._steps = tuple(steps) if steps else None
        self._runtime = runtime
        self._path = directory / "profile" / f"rank{runtime.rank}.pt.trace.json.gz"
        self._profiler: Any = None

    def before(self, step: int) -> Path | None:
        """Call before every step. Returns the file when the trace has just been written."""
        if self._steps is None:
            return None
        first, last = self._steps
        if step > last:
            return self.close()
        if self._profiler is not None:
            self._profiler.step()
        elif step >= first:
            self._start(step)
        return None

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerAction, ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # With a schedule each step is a span ProfilerStep#N, by which viewers find their way.
        self._profiler = profile(activities=activities, schedule=lambda _: ProfilerAction.RECORD, record_shapes=True)
        self._profiler.step_num = step
        self._profiler.start()

    def close(self) -> Path | None:
        """Write what has been recorded. Returns the file; None when there was nothing to write."""
        profiler, self._profiler = self._profiler, None
        self._steps = None
        if profiler is None:
            return None
        profiler.stop()
        self._path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
        return self._path
