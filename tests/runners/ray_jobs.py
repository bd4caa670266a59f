"""Functions of (task, runtime, control) that the workers of the runner's tests execute, like the engine's `run`.

As a program it is a driver that tests can kill: ray_jobs.py FUNCTION NOTE
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
    """The task. `note` is an argument of the function, `seconds` its time limit."""

    note: str = ""
    seconds: float = 20.0
    python_path: list[str] = field(default_factory=lambda: [HERE])


def facts(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Emit numbered events from every rank, and return facts about the workers."""
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
    """Send rank 1 the signal named by the note, while the others communicate with it."""
    control.emit({"kind": "phase", "name": "training"})
    if runtime.rank == 1:
        time.sleep(1)  # until its events are sent
        os.kill(os.getpid(), getattr(signal, task.note))
    while True:
        runtime.barrier()


def until_stopped(task: Task, runtime: Any, control: Any) -> dict[str, Any]:
    """Run until all ranks have received the request to stop. With the note "deaf" they ignore it."""
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
    """Read one epoch of the Parquet files in the folder that the note names, locally and with the runner's `apply`."""
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
    # Read them with the engine's loader for more than one epoch: the parts of the ranks are unequal.
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
    """Run a function on an embedded Ray. Exit with 130 after a graceful stop, with 131 after an immediate one."""
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
