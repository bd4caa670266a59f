"""What the workers of the runner's tests do: functions of (task, runtime, control), as the engine's `run` is one.

As a program it is a driver of its own, for the tests that end it: ray_jobs.py JOB SECONDS
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)


@dataclass
class Task:
    """`note` is what the job needs to know; `seconds` how long it works at most."""

    note: str = ""
    seconds: float = 20.0
    python_path: list[str] = field(default_factory=lambda: [HERE])


def facts(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Emit numbered events from every rank and return what this worker finds around it."""
    for number in range(50):
        control.emit({"kind": "progress", "rank": runtime.rank, "step": number})
    mine = {
        "rank": runtime.rank,
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "modules": [name for name in ("pandas", "torch") if name in sys.modules],
    }
    return {"workers": runtime.gather(mine), "world_size": runtime.world_size}


def fail_on_one_rank(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Raise on rank 1, while the others wait for it in a collective."""
    if runtime.rank == 1:
        raise ZeroDivisionError("mine")
    runtime.barrier()
    return {}


def die_on_one_rank(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Send rank 1 the signal named by the note, while the others go on talking to it."""
    control.emit({"kind": "phase", "name": "training"})
    if runtime.rank == 1:
        time.sleep(1)  # its events are on their way
        os.kill(os.getpid(), getattr(signal, task.note))
    while True:
        runtime.barrier()


def until_stopped(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Work until all ranks have seen the request to stop. With note "deaf" it is never seen."""
    control.emit({"kind": "phase", "name": "setup" if task.note == "never trains" else "training"})
    end = time.monotonic() + task.seconds
    seen: list[bool] = []
    while time.monotonic() < end:
        seen = runtime.gather("stop" in control.requests() and task.note != "deaf")
        if all(seen):
            break
        time.sleep(0.05)
    return {"seen": seen}


def read_stream(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Read one pass of the Parquet files in the folder that the note names, here and as the runner offers it."""
    import torch

    from launcher.engine.fetch import Fetch
    from launcher.engine.order import Key
    from launcher.engine.stream import StreamLoader
    from launcher.errors import DataError
    from models.parquet_data import Parquet, Stream

    data = Parquet(task.note, target="y", stream=True).train
    assert isinstance(data, Stream)
    parts = {
        "here": [x[:, 0].tolist() for x, _ in data.stream(runtime.rank, runtime.world_size, 3)],
        "there": [x[:, 0].tolist() for x, _ in data.stream(runtime.rank, runtime.world_size, 3, runtime.apply)],
    }
    # A second look through the engine's loader, for longer than one pass: the parts of the ranks are unequal.
    loader = StreamLoader(data, runtime, 0, fetch=Fetch(data, None, 0), convert=lambda batch: batch)
    more = 0
    with contextlib.closing(loader.read(iter([Key(1, 0, torch.arange(7))] * 30))) as batches:
        for x, _ in batches:
            runtime.barrier()
            more += len(x)
    runtime.barrier()
    Path(task.note, "part-1.parquet").unlink(missing_ok=True)
    try:
        next(loader.read(iter([Key(1, 0, torch.arange(200))])))
    except DataError as error:
        return {"workers": runtime.gather({**parts, "more": more, "failed": str(error)})}
    return {}


def main() -> None:
    """Run one job on an embedded Ray of its own; exit 130 when stopped in order, 131 when stopped at once."""
    from launcher.clusters.local.embedded_ray import EmbeddedRay
    from launcher.errors import Stopped
    from launcher.runners.signals import Interrupts

    job, note = sys.argv[1], sys.argv[2]
    with Interrupts() as interrupts, EmbeddedRay(2, 0) as cluster:
        from launcher.runners import ray_train

        print("session", cluster.directory, flush=True)
        try:
            result = ray_train.run(
                Task(note, seconds=60.0),
                workers=2,
                cpus_per_worker=1.0,
                gpus_per_worker=0.0,
                cluster=cluster,
                on_event=lambda event: print("event", event.get("name"), flush=True),
                interrupts=interrupts,
                main=f"ray_jobs:{job}",
            )
            print("result", result, flush=True)
        except Stopped as stopped:
            print("stopped", stopped.signal_number, flush=True)
            sys.exit(131)
    sys.exit(130 if interrupts.count else 0)


if __name__ == "__main__":
    main()
