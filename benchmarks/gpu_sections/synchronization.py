"""Counts synchronizations of the host with the device between two logs, by profiling steps of every strategy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.figures import Figures
from benchmarks.gpu_sections.session import Section, Session
from benchmarks.harness import Failed
from launcher.engine.runtime import Runtime

# Names of waiting operations in the profiler. `.item()` on a GPU tensor calls one of them.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# Operations that read a number on the host; they do not wait if the tensor is on the host already.
READS = ("aten::_local_scalar_dense", "aten::nonzero")
BEGIN, END = "benchmark: begin", "benchmark: end"

# By name: settings of the strategy and of the trainer, and the numbers that the host may read in a step on the CPU,
# where the engine checks the loss of each microbatch, the gradients and the vote.
STRATEGIES: dict[str, tuple[Figures, Figures, int]] = {
    "ddp": ({}, {}, 4),
    "ddp, clipped": ({}, {"clip_norm": 1.0}, 4),
    "ddp, bfloat16": ({}, {"precision": "bfloat16"}, 4),
    "ddp, accumulating": ({}, {"microbatch_size": 25}, 6),
    "deterministic": ({}, {"deterministic": True}, 18),
    "bf16": ({"compression": "bf16"}, {}, 4),
    "powersgd": ({"compression": "powersgd"}, {}, 4),
    "local_sgd": ({"name": "local_sgd"}, {}, 4),
    "diloco": ({"name": "diloco"}, {}, 4),
    "fsdp": ({"name": "fsdp"}, {}, 4),
}


class Meter:
    """The engine's control (`launcher.engine.control.Control`). It is called at the start of each step, so it measures
    the time.

    Args:
        first, last: steps between which the time is measured.
        profiled: (first, last) of the steps under the profiler; no log may fall between them.
    """

    def __init__(self, device: torch.device, first: int, last: int, profiled: tuple[int, int]) -> None:
        self._device = device
        self._first, self._last, self._profiled = first, last, profiled
        self._step = 0
        self._began = 0.0
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(activities=activities)
        self.seconds = float("nan")
        self.counts: Counter[str] = Counter()

    def requests(self) -> frozenset[str]:
        self._step += 1
        if self._step == self._first:
            self._began = now(self._device)
        elif self._step == self._last:
            self.seconds = now(self._device) - self._began
        elif self._step == self._profiled[0]:
            self._profile.start()
            with record_function(BEGIN):
                pass
        elif self._step == self._profiled[1]:
            with record_function(END):
                pass
            self._profile.stop()
            self.counts = count(self._profile.events() or [])
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        """Progress is not shown."""


def now(device: torch.device) -> float:
    """Return the seconds of a clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count(events: Iterable[Any]) -> Counter[str]:
    """Return how often each of WAITS and READS was called between the marks, without the profiler's own waits.

    Args:
        events: the profiler's, each with `name` and `time_range.start` and `.end`.

    Raises:
        Failed: a mark is missing.
    """
    listed = list(events)
    begins = [event.time_range.end for event in listed if event.name == BEGIN]
    ends = [event.time_range.start for event in listed if event.name == END]
    if not begins or not ends:
        raise Failed("the profiler lost the marks around the steps")
    return Counter(
        event.name for event in listed if event.name in WAITS + READS and begins[0] <= event.time_range.start < ends[-1]
    )


def run(session: Session) -> Section:
    section = Section("never waits")
    steps = 3 if session.tiny else 20
    for name, (strategy, trainer, reads_on_cpu) in STRATEGIES.items():
        with section.going_on(name):
            job = session.job(strategy=strategy, **{"log_every": 10 + steps, "steps": 12 + steps, **trainer})
            meter = Meter(session.device, 1, 2, (5, 5 + steps))
            group = session.one_rank() if strategy else nullcontext(Runtime.single(session.device.type))
            with group as runtime:
                session.train(job, name.replace(", ", "-"), runtime, meter, observed=False)
            waits, reads = (sum(meter.counts[what] for what in kind) / steps for kind in (WAITS, READS))
            section.figures[name] = {"waits": waits, "reads": reads}
            if session.on_gpu:
                section.at_most(f"{name}: waits a step", waits, 0.0)
            else:
                section.at_most(f"{name}: reads a step", reads, reads_on_cpu)
    section.remarks.append(f"Waits are {', '.join(WAITS)}; reads are {', '.join(READS)}.")
    return section
