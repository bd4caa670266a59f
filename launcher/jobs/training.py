"""From the words of a command to a finished run: prepare, plan, write the directory, run, record.

The command line and the Python API are both thin shells around `train`. What is done with a run afterwards is in
`trained.py`.
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
from launcher.config import Job, peek
from launcher.errors import LaunchError, from_dict, to_dict
from launcher.jobs import ranks
from launcher.jobs.prepare import Prepared, Request
from launcher.jobs.record import Record
from launcher.jobs.remote.location import is_remote
from launcher.planning.plan import Placement, Plan, make_plan
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
    """What the caller wants to hear of a run. The command line and the Python API show it."""

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        """The run is known, and what it will do; no plan when nothing is left to do."""

    def event(self, event: Event) -> None:
        """An event of the run; see `engine.control.Control.emit`."""

    def sent(self, directory: RunDirectory, where: str) -> None:
        """The run is driven elsewhere; what `prepared` would tell comes as an event of kind `begun`."""

    def asked_to_end(self) -> str:
        """Ctrl-C came while a run elsewhere is followed: return "stop" or "detach"."""
        return "stop"


def begun(prepared: Prepared, plan: Plan | None) -> Event:
    """Return what is told of a run that begins, as an event: without a plan there is nothing left to do."""
    if plan is None:
        return {"kind": "begun", "finished": True, "text": prepared.nothing_to_do()}
    facts = {"workers": plan.machines.workers, "headline": plan.headline(), "changes": list(prepared.changes)}
    return {"kind": "begun", "finished": False, **facts}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: result.json's content, its directory, and the signal that stopped it, if one did.

    `result` is empty on ranks other than 0.
    """

    result: dict[str, Any]
    directory: RunDirectory
    signal_number: int | None = None
    detached: bool = False  # it goes on elsewhere, and nobody here follows it


def train(request: Request, observer: Observer) -> Outcome:
    """Run one job to its end.

    Raises:
        RequestError: it cannot be done as asked; nothing was started.
        TrainingError: it started and failed; result.json says so.
        Stopped: it was ended at once by a signal.
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
            return _train_elsewhere(request, prepared, observer)
        if prepared.job.cluster.setup and request.on_head is None:
            observer.event(
                {"kind": "note", "text": "cluster.setup is for the nodes of a cluster; nothing of it is run here."}
            )
        plan = checked_plan(prepared.job, observer, None, record.marks, record.weights())
        task = record.begin(plan)
        observer.prepared(prepared, plan)
        with _alive(prepared.directory):
            result, signal_number = run_task(task, plan.machines, observer.event)
        record.ended()
        money.mark_budget_spent(result)
        return Outcome(result, prepared.directory, signal_number)


def _train_elsewhere(request: Request, prepared: Prepared, observer: Observer) -> Outcome:
    """Send the run to the cluster that its configuration names, and follow it."""
    from launcher.jobs.remote.submit import Submission
    from launcher.runners.signals import Interrupts

    def sent(where: str) -> None:
        observer.sent(prepared.directory, where)

    with Interrupts() as interrupts:
        ended = Submission(request, prepared, sent, observer.event, observer.asked_to_end).train(interrupts)
    return Outcome(ended.result, prepared.directory, ended.signal_number, ended.detached)


def checked_plan(
    job: Job, observer: Observer, ranks: int | None = None, marks: Marks | None = None, weights: str | None = None
) -> Plan:
    """Make the plan; what the user's code prints while it is tried out is passed on as events."""
    with _trying(observer):
        return make_plan(job, ranks, marks, weights)


def checked_node_plan(prepared: Prepared, observer: Observer, ask: bool = True) -> NodePlan:
    """Make the plan for VMs that are not there, likewise. ask: Azure's public list for today's prices."""
    from launcher.planning.nodes import make_node_plan

    with _trying(observer):
        return make_node_plan(prepared.job, ask, prepared.directory if prepared.resumes else prepared.like)


def checked_host_plan(job: Job, observer: Observer) -> HostPlan:
    """Make the plan for the hosts that the configuration names, likewise, without a connection to them."""
    from launcher.planning.hosts import make_host_plan

    with _trying(observer):
        return make_host_plan(job)


def _trying(observer: Observer) -> AbstractContextManager[object]:
    from launcher.engine.console import capture_output

    def show(text: str, whole: bool) -> None:
        observer.event({"kind": "line", "rank": 0, "text": text, "whole": whole})

    observer.event({"kind": "phase", "name": "check"})
    return capture_output(show)


def run_task(task: Task, machines: Placement, on_event: Callable[[Event], None]) -> tuple[dict[str, Any], int | None]:
    """Run the task where the plan puts it. Returns rank 0's result, and the signal that came meanwhile."""
    if machines.in_process:
        from launcher.engine.runtime import Runtime
        from launcher.runners import in_process

        with in_process.DirectControl(on_event) as control:
            return in_process.run(task, Runtime.single(task.job.scaling.device), control), control.signal_number
    from launcher.runners.signals import Interrupts

    on_event({"kind": "phase", "name": "ray"})
    task.marks.begin("ray")
    use = base.Use(task.python_path, task.directory, task.job.verbose, "launcher.runners.ray_train")
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
    """Have Ctrl-C and SIGTERM end what is under way, until a runner takes them over to end its run in order."""
    from launcher.runners.signals import Interrupts

    with Interrupts() as interrupts, interrupts.at_once():
        yield


def _alive(directory: RunDirectory) -> AbstractContextManager[object]:
    """Keep the run's heartbeat while workers start and read their data; they keep it themselves once they train."""
    from launcher.engine.control import Heartbeat

    return Heartbeat(directory)


# ---- torchrun and srun ----------------------------------------------------------------------------------------------


def _train_as_rank(request: Request, observer: Observer, facts: ranks.Facts, record: Record) -> Outcome:
    """Train as one of the ranks that torchrun or srun started. Rank 0 prepares the run for all, and talks."""
    from launcher.runners import in_process

    with ranks.joined(facts, device_of(request)) as runtime:
        prepared, task = _agree(observer, runtime, record)
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
    """The device decides how the ranks talk to each other: known before rank 0 has prepared the run."""
    from launcher.config import targets

    targets.add_calling_directory(request.calling)
    words = [word for word in request.words if word.lstrip("+").startswith("scaling.device=")]
    return str(peek(words, request.config_dir, "scaling").device)


def _agree(observer: Observer, runtime: Runtime, record: Record) -> tuple[Prepared | None, Task | None]:
    """Return (rank 0's preparation, everybody's task). An error of rank 0 is raised on every rank."""
    prepared, task, failure = None, None, None
    if runtime.is_first:
        try:
            prepared, plan = record.prepare(), None
            if not prepared.finished:
                plan = checked_plan(prepared.job, observer, runtime.world_size, record.marks, record.weights())
                task = record.begin(plan)
            observer.prepared(prepared, plan)
            asked = prepared.job.scaling.workers
            if asked not in ("auto", runtime.world_size):
                why = f"the {runtime.world_size} processes that were started are the workers"
                observer.event({"kind": "note", "text": f"scaling.workers={asked} is ignored: {why}."})
        except LaunchError as error:
            failure = error
    described = {"failure": failure and to_dict(failure), "task": task and asdict(task)}
    found = runtime.broadcast(described if runtime.is_first else None)
    from launcher.engine.entry import Task

    if found["failure"] is not None:
        raise failure or from_dict(found["failure"])
    return prepared, None if found["task"] is None else Task.from_dict(found["task"])


# ---- what the shells say and return ----------------------------------------------------------------------------------


def over_text(changes: Sequence[str]) -> str:
    return f"Over the run's own configuration: {' '.join(changes)}"


def exit_status_of(signal_number: int | None) -> int:
    """Return 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal_number or signal.SIGINT)
