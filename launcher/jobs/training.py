"""Trains a run: prepares and plans it, writes its directory, executes it and records its end.

The command line and the Python API call `train`. `trained.py` evaluates, predicts with and exports the result.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import money
from launcher.clusters import base
from launcher.config import Job, peek, targets
from launcher.engine.console import capture_output
from launcher.engine.control import Heartbeat
from launcher.errors import LaunchError, from_dict, to_dict
from launcher.jobs import ranks
from launcher.jobs.prepare import Prepared, Request
from launcher.jobs.record import Record
from launcher.jobs.remote.location import is_remote
from launcher.planning.plan import Placement, Plan, make_plan
from launcher.runners.signals import Interrupts
from launcher.runs import RunDirectory
from launcher.runs.mirror import local
from launcher.startup_timing import Marks

if TYPE_CHECKING:
    from launcher.engine.entry import Task
    from launcher.engine.runtime import Runtime
    from launcher.planning.hosts import HostPlan
    from launcher.planning.nodes import NodePlan

Event = dict[str, Any]


class Observer:
    """Receives the progress of a run. The command line and the Python API implement it."""

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        """Called when the run is prepared and planned. plan: None if the run is already complete."""

    def event(self, event: Event) -> None:
        """Called for each event of the run; see `engine.control.Control.emit`."""

    def sent(self, directory: RunDirectory, where: str) -> None:
        """Called when the run was submitted to a remote cluster. An event of kind `begun` replaces `prepared`."""

    def asked_to_end(self) -> str:
        """Called on Ctrl-C while a remote run is followed: return "stop" or "detach"."""
        return "stop"


def begun(prepared: Prepared, plan: Plan | None) -> Event:
    """Return the event `begun`, by which a driver on a cluster reports the start of a run. No plan: it is complete."""
    if plan is None:
        return {"kind": "begun", "finished": True, "text": prepared.nothing_to_do()}
    facts = {"workers": plan.machines.workers, "headline": plan.headline(), "changes": list(prepared.changes)}
    return {"kind": "begun", "finished": False, **facts}


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        result: the content of result.json; empty on ranks other than 0.
        directory: the run's directory.
        signal_number: the signal that stopped the run, or None.
        detached: the run continues on a remote cluster, and this command has stopped following it.
    """

    result: dict[str, Any]
    directory: RunDirectory
    signal_number: int | None = None
    detached: bool = False


def train(request: Request, observer: Observer) -> Outcome:
    """Run one job to its end.

    Raises:
        RequestError: the request is invalid; nothing was started.
        TrainingError: the run started and failed, and result.json has the error.
        Stopped: a signal ended the run without a checkpoint.
    """
    facts = ranks.in_environment()
    with Record(request) as record, ended_by_signals():
        if facts is not None:
            return _train_as_rank(request, observer, facts, record)
        prepared = record.prepare()
        if prepared.finished:
            observer.prepared(prepared, None)
            return Outcome(prepared.directory.result(), prepared.directory)
        if is_remote(prepared.job.cluster):
            return _train_remotely(request, prepared, observer)
        if prepared.job.cluster.setup and request.on_head is None:
            text = "cluster.setup is ignored: its commands run only on the nodes of a remote cluster."
            observer.event({"kind": "note", "text": text})
        plan = checked_plan(prepared.job, observer, None, record.marks, record.weights())
        task = record.begin(plan)
        observer.prepared(prepared, plan)
        with _alive(prepared.directory):
            result, signal_number = run_task(task, plan.machines, observer.event)
        record.ended()
        money.mark_budget_spent(result)
        return Outcome(result, prepared.directory, signal_number)


def _train_remotely(request: Request, prepared: Prepared, observer: Observer) -> Outcome:
    """Submit the run to the cluster in its configuration, and follow it."""
    from launcher.jobs.remote.submit import Submission

    def sent(where: str) -> None:
        observer.sent(prepared.directory, where)

    with Interrupts() as interrupts:
        ended = Submission(request, prepared, sent, observer.event, observer.asked_to_end).train(interrupts)
    return Outcome(ended.result, prepared.directory, ended.signal_number, ended.detached)


def checked_plan(
    job: Job, observer: Observer, ranks: int | None = None, marks: Marks | None = None, weights: str | None = None
) -> Plan:
    """Make the plan. The output of the user's code during the start check becomes events."""
    with _trying(observer):
        return make_plan(job, ranks, marks, weights)


def checked_node_plan(prepared: Prepared, observer: Observer, ask: bool = True) -> NodePlan:
    """Make the plan for VMs that do not exist yet, as `checked_plan`.

    Args:
        ask: query Azure's public price list.
    """
    from launcher.planning.nodes import make_node_plan

    with _trying(observer):
        return make_node_plan(prepared.job, ask, prepared.directory if prepared.resumes else prepared.like)


def checked_host_plan(job: Job, observer: Observer) -> HostPlan:
    """Make the plan for the hosts in the configuration, as `checked_plan`. It opens no connection."""
    from launcher.planning.hosts import make_host_plan

    with _trying(observer):
        return make_host_plan(job)


def _trying(observer: Observer) -> AbstractContextManager[object]:
    def show(text: str, whole: bool) -> None:
        observer.event({"kind": "line", "rank": 0, "text": text, "whole": whole})

    observer.event({"kind": "phase", "name": "check"})
    return capture_output(show)


def run_task(task: Task, machines: Placement, on_event: Callable[[Event], None]) -> tuple[dict[str, Any], int | None]:
    """Run the task on the machines of its plan. Return rank 0's result, and the signal that was received, or None."""
    if machines.in_process:
        from launcher.engine.runtime import Runtime
        from launcher.runners import in_process

        with in_process.DirectControl(on_event) as control:
            return in_process.run(task, Runtime.single(task.job.scaling.device), control), control.signal_number
    on_event({"kind": "phase", "name": "ray"})
    task.marks.begin("ray")
    use = base.Use(
        python_path=task.python_path,
        directory=task.directory,
        verbose=task.job.verbose,
        preload="launcher.runners.ray_train",
        report=lambda text: on_event({"kind": "note", "text": text}),
    )
    place = base.kind_of(task.job.cluster).connect(task.job.cluster, use)
    with Interrupts() as interrupts, place as cluster:
        from launcher.runners import ray_train

        on_event({"kind": "phase", "name": "workers"})
        task.marks.begin("workers")
        result = ray_train.run(
            task,
            workers=machines.workers,
            cpus_per_worker=machines.cpus_per_worker,
            gpus_per_worker=machines.gpus_per_worker,
            cluster=cluster,
            on_event=on_event,
            interrupts=interrupts,
            limits=ray_train.Limits(
                max_failures=task.job.checkpoint.max_failures,
                min_workers=task.job.scaling.min_workers,
                timeout=task.job.scaling.timeout,
            ),
        )
        return result, interrupts.signal_number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM raise Stopped in this block, until a runner handles them to stop gracefully."""
    with Interrupts() as interrupts, interrupts.at_once():
        yield


def _alive(directory: RunDirectory) -> AbstractContextManager[object]:
    """Write the run's heartbeat while the workers start and load data. During training, rank 0 writes it."""
    return Heartbeat(directory)


# ---- torchrun and srun ----------------------------------------------------------------------------------------------


def _train_as_rank(request: Request, observer: Observer, facts: ranks.Facts, record: Record) -> Outcome:
    """Train as one of the ranks that torchrun or srun started. Rank 0 prepares the run for all ranks, and prints."""
    from launcher.runners import in_process

    with ranks.joined(facts, device_of(request)) as runtime:
        prepared, task = _share_task(observer, runtime, record)
        if task is None:
            directory = prepared.directory if prepared is not None else RunDirectory(Path())
            return Outcome(directory.result(), directory)
        directory = RunDirectory(local(task.directory))
        with (
            _alive(directory) if runtime.is_first else nullcontext(),
            in_process.DirectControl(observer.event, shared=True) as control,
        ):
            result = in_process.run(task, runtime, control)
        record.ended()
        money.mark_budget_spent(result)
        return Outcome(result, directory, control.signal_number)


def device_of(request: Request) -> str:
    """Return `scaling.device` of the overrides. It selects the backend of the process group that prepares the run."""
    targets.add_calling_directory(request.calling)
    words = [word for word in request.words if word.lstrip("+").startswith("scaling.device=")]
    return str(peek(words, request.config_dir, "scaling").device)


def _share_task(observer: Observer, runtime: Runtime, record: Record) -> tuple[Prepared | None, Task | None]:
    """Prepare the run on rank 0, and return (the prepared run or None, the task). All ranks raise an error of rank 0.

    The task is None if the run is already complete.
    """
    prepared, task, failure = None, None, None
    if runtime.is_first:
        try:
            prepared, plan = record.prepare(), None
            if not prepared.finished:
                plan = checked_plan(prepared.job, observer, runtime.world_size, record.marks, record.weights())
                task = record.begin(plan)
            observer.prepared(prepared, plan)
            workers = prepared.job.scaling.workers
            if workers not in ("auto", runtime.world_size):
                why = f"the {runtime.world_size} processes that were started are the workers"
                observer.event({"kind": "note", "text": f"scaling.workers={workers} is ignored: {why}."})
        except LaunchError as error:
            failure = error
    described = {"failure": failure and to_dict(failure), "task": task and asdict(task)}
    found = runtime.broadcast(described if runtime.is_first else None)
    from launcher.engine.entry import Task

    if found["failure"] is not None:
        raise failure or from_dict(found["failure"])
    return prepared, None if found["task"] is None else Task.from_dict(found["task"])


# ---- for the command line and the Python API -------------------------------------------------------------------------


def over_text(changes: Sequence[str]) -> str:
    """Return the note about overrides of an existing run's configuration."""
    return f"Over the run's own configuration: {' '.join(changes)}"


def exit_status_of(signal_number: int | None) -> int:
    """Return the exit status for a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal_number or signal.SIGINT)
