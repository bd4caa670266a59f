"""Runs a task as real processes, one per rank, connected by gloo over loopback; and reads the files of a run."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.config import CheckpointConfig, Job, LoggingConfig, ScalingConfig, StrategyConfig, TrainerConfig
from launcher.engine import entry
from launcher.engine.checkpoint import available, load_weights, newest_intact
from launcher.engine.runtime import Runtime
from launcher.money import Bill
from launcher.runs import RunDirectory
from tests.support import engine_toys as toys
from tests.support.device import device
from tests.support.waiting import limit

# A server that has imported torch forks every rank, so that no rank spends seconds importing it.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "launcher.engine.entry",
        "launcher.engine.checkpoint.training",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
        "torch._dynamo",
    ]
)
_TOYS = "tests.support.engine_toys"


# ---- what to run ----------------------------------------------------------------------------------------------------


def make_job(
    *,
    model: str | Mapping[str, Any] = "Net",
    data: str | Mapping[str, Any] = "Points",
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    logging: Mapping[str, Any] | None = None,
    callbacks: Mapping[str, Any] | None = None,
    strategy: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> Job:
    """Return a job with classes of `engine_toys`, given by name or as a mapping; other arguments belong to "
    "`trainer`."""

    def section(value: str | Mapping[str, Any]) -> dict[str, Any]:
        given = {"_target_": value} if isinstance(value, str) else dict(value)
        name = given["_target_"]
        return {**given, "_target_": name if "." in name else f"{_TOYS}.{name}"}

    return Job(
        model=section(model),
        data=section(data),
        optimizer=dict(optimizer or {"_target_": "torch.optim.AdamW", "lr": 0.01}),
        scheduler=dict(scheduler or {}),
        trainer=replace(TrainerConfig(global_batch_size=100, log_every=1), **trainer),
        scaling=ScalingConfig(device=device()),
        checkpoint=replace(CheckpointConfig(), **dict(checkpoint or {})),
        callbacks={name: value and section(value) for name, value in (callbacks or {}).items()},
        strategy=StrategyConfig(**dict(strategy or {})),
        logging=replace(LoggingConfig(tensorboard=False, graph=False), **dict(logging or {})),
        trust=[_TOYS],
    )


@dataclass(frozen=True)
class Script:
    """The requests and signals that a rank receives. Steps are counted over the whole run, as in the logs.

    `stop_after`, `kill_after`: asked to stop, or killed, when that step is done (the next one has just begun).
    `once_saved`: it is killed as soon as the checkpoint of that step is complete, no matter how fast the disk is.
    """

    stop_after: int | None = None
    kill_after: int | None = None
    once_saved: int | None = None


class Puppet:
    """A control of the engine that follows a script and records the events."""

    def __init__(self, script: Script, directory: RunDirectory, began_at: int) -> None:
        self._script = script
        self._directory = directory
        self._done = began_at - 1
        self.events: list[dict[str, Any]] = []

    def requests(self) -> frozenset[str]:
        self._done += 1  # called when a step begins
        toys.RECORD.append(("step", self._done + 1))
        script = self._script
        if script.kill_after is not None and self._done >= script.kill_after:
            while script.once_saved is not None and script.once_saved not in available(self._directory.checkpoints):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        asked = script.stop_after is not None and self._done >= script.stop_after - 1
        return frozenset({"stop"} if asked else ())

    def emit(self, event: dict[str, Any]) -> None:
        json.dumps(event)  # events are sent as JSON
        self.events.append(event)


# ---- running it -----------------------------------------------------------------------------------------------------


@dataclass
class Rank:
    """The result of one rank. `error`: (class name, message, traceback of the user's code) of its exception.

    `record`: what the toys noted; `weights`: those of its own network at the end; `exit_code`: below zero where a
    signal ended it, and then nothing else is known.
    """

    result: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    record: list[Any] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    error: tuple[str, str, str] | None = None
    children: list[int] = field(default_factory=list)
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def notes(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["kind"] == "note")


def _facts(rank: int, workers: int, machines: int) -> tuple[int, int, int, int]:
    """Simulate ranks that are distributed over several machines, the first ranks on the first machine."""
    here = workers // machines
    return rank, workers, rank % here, here


def _body(rank: int, workers: int, store: str, answer: str, task: entry.Task, script: Script, machines: int) -> None:
    given = Rank()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    began = time.monotonic()
    directory = RunDirectory(Path(task.directory))
    newest = newest_intact(directory.checkpoints).path
    puppet = Puppet(script, directory, int(newest.name[5:]) if newest is not None else 0)
    try:
        if workers == 1:
            # With one thread per core, the threads wait for each other on a busy machine: small networks took ten
            # times as long.
            os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
            runtime = Runtime.single(device())
        else:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=workers,
                timeout=timedelta(seconds=120),
            )
            runtime = Runtime.adopt(*_facts(rank, workers, machines), device())
        given.result = entry.run(task, runtime, puppet)
        given.children = toys.living_children()
    except Exception as error:
        given.children = toys.living_children()
        user = getattr(error, "traceback_text", None)
        given.error = (type(error).__name__, str(error), traceback.format_exc() if user is None else user)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    given.seconds = time.monotonic() - began
    given.events, given.record = puppet.events, toys.RECORD
    if toys.MODELS:
        given.weights = {name: value.detach().clone() for name, value in toys.MODELS[-1].state_dict().items()}
    # To a file: a queue would send tensors as handles of this process, which is about to exit.
    Path(f"{answer}.part").write_bytes(pickle.dumps(given))
    os.replace(f"{answer}.part", answer)


def _call(
    rank: int, workers: int, store: str, answer: str, function: Callable[..., Any], arguments: Any, machines: int
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=timedelta(seconds=120)
    )
    try:
        given = function(Runtime.adopt(*_facts(rank, workers, machines), device()), *arguments)
    except Exception:
        given = traceback.format_exc()
    finally:
        dist.destroy_process_group()
    torch.save(given, f"{answer}.part")
    os.replace(f"{answer}.part", answer)


def on_ranks(
    function: Callable[..., Any], workers: int, *arguments: Any, timeout: float = 60, machines: int = 1
) -> list[Any]:
    """Call `function(runtime, *arguments)` in `workers` processes; return the results by rank. Needs a module "
    "function."""
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            _SERVER.Process(
                target=_call,
                args=(rank, workers, f"{scratch}/store", f"{scratch}/{rank}", function, arguments, machines),
            )
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        _join(processes, time.monotonic() + limit(timeout), timeout)
        given = [torch.load(Path(scratch, str(rank)), weights_only=False) for rank in range(workers)]
    for rank, answer in enumerate(given):
        assert not (isinstance(answer, str) and answer.startswith("Traceback")), f"rank {rank}: {answer}"
    return given


def _join(processes: Sequence[Any], deadline: float, timeout: float) -> None:
    """Wait for the processes until the deadline and kill the others, which fails the test."""
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"ranks {late} of {len(processes)} had not ended after {timeout} s"


def launch(
    job: Job,
    directory: Path,
    workers: int = 1,
    *,
    scripts: Mapping[int, Script] | Script | None = None,
    weights: str | None = None,
    action: Any = "train",
    rows: str | None = None,
    timeout: float = 60,
    kill_when: Callable[[], bool] | None = None,
    machines: int = 1,
) -> list[Rank]:
    """Run the job's task as `workers` processes and return the results by rank. A single `Script` applies to all ranks.

    The directory is used as it is: with checkpoints in it, the run is continued. All ranks are killed at whatever
    moment `kill_when` becomes true.
    """
    while any(int(file.name.split(".")[3]) >= int(time.time()) for file in directory.glob("events.*")):
        time.sleep(0.05)  # TensorBoard sorts the files of a directory by the second in their names
    run_directory = RunDirectory(directory)
    run_directory.create()
    run_directory.clear_requests()
    bill = Bill(float(run_directory.result().get("seconds") or 0.0))
    task = entry.Task(action, job, str(directory), [], time.time(), weights, bill=bill, rows=rows)
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for rank in range(workers):
            script = scripts if isinstance(scripts, Script) else (scripts or {}).get(rank, Script())
            arguments = (rank, workers, f"{scratch}/store", f"{scratch}/{rank}", task, script, machines)
            processes.append(_SERVER.Process(target=_body, args=arguments))
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit(timeout)
        if kill_when is not None:
            while not kill_when() and time.monotonic() < deadline:
                time.sleep(0.0005)
            for process in processes:
                process.kill()
        _join(processes, deadline, timeout)
        ranks = []
        for rank, process in enumerate(processes):
            file = Path(scratch, str(rank))
            given = pickle.loads(file.read_bytes()) if file.exists() else Rank()
            ranks.append(replace(given, exit_code=process.exitcode))
    return ranks


def succeed(job: Job, directory: Path, workers: int = 1, **how: Any) -> list[Rank]:
    """Call `launch`, and assert that no rank fails."""
    ranks = launch(job, directory, workers, **how)
    for number, rank in enumerate(ranks):
        assert rank.error is None, f"rank {number} of {workers}: {rank.error[0]}: {rank.error[1]}\n{rank.error[2]}"
        assert rank.exit_code == 0, f"rank {number} of {workers} ended with {rank.exit_code}"
    return ranks


def kill(job: Job, directory: Path, workers: int, after: int, once_saved: int | None = None) -> None:
    """Run the job and kill every rank when step `after` is done."""
    ranks = launch(job, directory, workers, scripts=Script(kill_after=after, once_saved=once_saved))
    assert [rank.exit_code for rank in ranks] == [-signal.SIGKILL] * workers, ranks


# ---- files of a run -------------------------------------------------------------------------------------------------

# Tags that depend on the clock, the memory or the number of workers, and so differ between equal runs.
_OF_THE_MACHINE = ("throughput/", "memory/", "cluster/", "time")


def logged(directory: Path, machine: bool = False) -> dict[int, dict[str, float]]:
    """Return step -> {name: value} of metrics.jsonl. Asserts that no step occurs twice."""
    entries: dict[int, dict[str, float]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        entry_ = json.loads(line)
        assert entry_["step"] not in entries, f"step {entry_['step']} is there twice"
        kept = {key: value for key, value in entry_.items() if machine or not key.startswith(_OF_THE_MACHINE)}
        entries[entry_["step"]] = kept
    return entries


def column(directory: Path, tag: str) -> list[float]:
    """Return the logged values of one tag, by step."""
    return [values[tag] for _, values in sorted(logged(directory, machine=True).items()) if tag in values]


def board(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return tag -> [(step, value)] as TensorBoard reads the run's directory; again without the machine's tags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith(_OF_THE_MACHINE)]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    path = newest_intact(directory / "checkpoints").path
    assert path is not None
    return load_weights(path)


def result_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def assert_same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{name} differs by {(value - other[name]).abs().max():.3g}"


def assert_same_log(one: Path, other: Path) -> None:
    """Bit for bit, every value of every step."""
    first, second = logged(one), logged(other)
    assert first.keys() == second.keys()
    for step, values in first.items():
        assert values == second[step], f"step {step}"


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_log(one, other)
    assert_same_weights(final_weights(one), final_weights(other))


def close(one: float, other: float, tolerance: float) -> bool:
    return math.isclose(one, other, rel_tol=0, abs_tol=tolerance)


def trained(rank: Any) -> list[Any]:
    """Return the record of a rank from its first step on, without the trials before it."""
    first = next(at for at, entry in enumerate(rank.record) if entry[0] == "step")
    return list(rank.record[first:])
