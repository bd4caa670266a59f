"""Jobs of the workers in the tests of warm groups: functions of (task, runtime, control), like the engine's `run`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.startup_timing import Marks

HERE = str(Path(__file__).resolve().parent)


@dataclass
class Task:
    """A task. `note` is the name of the function in this module that runs it, with arguments."""

    note: str = ""
    python_path: list[str] = field(default_factory=lambda: [HERE])
    started: float = field(default_factory=time.time)
    marks: Marks = field(default_factory=Marks)


def main(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    return globals()[task.note.split()[0]](task, runtime, control)


def facts(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Return the process ids of the group, gathered from all ranks."""
    return {"pids": runtime.gather(os.getpid()), "world_size": runtime.world_size}


def age(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Return how long ago the task was started by the clock of each rank."""
    return {"ages": runtime.gather(time.time() - task.started)}


def fail_on_rank_1(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Raise on one rank while the others wait for it in a collective."""
    if runtime.rank == 1:
        raise ZeroDivisionError("mine")
    runtime.barrier()
    return {}


def hang_after_an_error(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Raise on one rank while the other sleeps in user code."""
    if runtime.rank == 1:
        raise ZeroDivisionError("mine")
    time.sleep(600)
    return {}


def die_on_rank_1(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    control.emit({"kind": "phase", "name": "training"})
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.barrier()
    return {}


def train_a_little(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Leave the remains of a trial in the process: process groups, a large network, reference cycles."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    runtime.new_host_group()
    model = DistributedDataParallel(torch.nn.Linear(1000, 1000))  # 4 MB, 12 with gradient and bucket
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(64, 1000)).sum().backward()
        optimizer.step()
    vars(model)["cycle"] = [model]
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "mib": _resident(),
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def until_stopped(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Emit progress until all ranks have seen the request that the note names."""
    control.emit({"kind": "phase", "name": "training"})
    request = task.note.split()[1]
    step = 0
    while True:
        step += 1
        control.emit({"kind": "progress", "step": step, "rank": runtime.rank})
        if all(runtime.gather(request in control.requests())):
            return {"stopped": request}
        time.sleep(0.02)
