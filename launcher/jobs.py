"""From the words of a command to a finished run: prepare, plan, write the directory, run, record.

The command line and the Python API are both thin shells around `train`. What is done with a run afterwards is in
`trained.py`.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import money, provenance, ranks, runs
from launcher.config import ClusterConfig, Job, peek
from launcher.errors import LaunchError, RequestError, RunError, Stopped, StorageError, did_you_mean
from launcher.mirror import Mirrored, local
from launcher.money import Bill, Rate
from launcher.phases import Marks
from launcher.phrases import size
from launcher.plan import Machines, Plan, make_plan
from launcher.prepare import Prepared, Request, prepare, root_of
from launcher.remote.place import is_elsewhere
from launcher.runs import RunDirectory
from launcher.storage import is_uri

if TYPE_CHECKING:
    from launcher.clusters.existing import ExistingRay
    from launcher.clusters.local import EmbeddedRay
    from launcher.engine.entry import Task
    from launcher.engine.runtime import Runtime
    from launcher.node_plan import NodePlan

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
        return {"kind": "begun", "finished": True}
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
        if is_elsewhere(prepared.job.cluster):
            return _train_elsewhere(request, prepared, observer)
        if prepared.job.cluster.setup and request.on_head is None:
            observer.event(
                {"kind": "note", "text": "cluster.setup is for the nodes of a cluster; nothing of it is run here."}
            )
        plan = checked_plan(prepared.job, observer, marks=record.marks)
        task = record.begin(plan)
        observer.prepared(prepared, plan)
        with _alive(prepared.directory):
            result, signal_number = run_task(task, plan.machines, observer.event)
        record.ended()
        money.tell_owner(result)
        return Outcome(result, prepared.directory, signal_number)


def _train_elsewhere(request: Request, prepared: Prepared, observer: Observer) -> Outcome:
    """Send the run to the cluster that its configuration names, and follow it."""
    from launcher.remote.caller import Caller
    from launcher.runners.signals import Interrupts

    def sent(where: str) -> None:
        observer.sent(prepared.directory, where)

    with Interrupts() as interrupts:
        ended = Caller(request, prepared, sent, observer.event, observer.asked_to_end).train(interrupts)
    return Outcome(ended.result, prepared.directory, ended.signal_number, ended.detached)


def checked_plan(job: Job, observer: Observer, ranks: int | None = None, marks: Marks | None = None) -> Plan:
    """Make the plan; what the user's code prints while it is tried out is passed on as events."""
    with _trying(observer):
        return make_plan(job, ranks, marks)


def checked_node_plan(prepared: Prepared, observer: Observer, ask: bool = True) -> NodePlan:
    """Make the plan for VMs that are not there, likewise. ask: Azure's public list for today's prices."""
    from launcher.node_plan import make_node_plan

    with _trying(observer):
        return make_node_plan(prepared.job, ask, prepared.directory if prepared.resumes else prepared.like)


def _trying(observer: Observer) -> AbstractContextManager[object]:
    from launcher.engine.console import captured

    def show(text: str, whole: bool) -> None:
        observer.event({"kind": "line", "rank": 0, "text": text, "whole": whole})

    observer.event({"kind": "phase", "name": "check"})
    return captured(show)


def run_task(task: Task, machines: Machines, on_event: Callable[[Event], None]) -> tuple[dict[str, Any], int | None]:
    """Run the task where the plan puts it. Returns rank 0's result, and the signal that came meanwhile."""
    if machines.cluster == "none":
        from launcher.engine.runtime import Runtime
        from launcher.runners import in_process

        with in_process.DirectControl(on_event) as control:
            return in_process.run(task, Runtime.single(task.job.scaling.device), control), control.signal_number
    from launcher.runners.signals import Interrupts

    on_event({"kind": "phase", "name": "ray"})
    task.marks.begin("ray")
    place = cluster_of(
        task.job.cluster, task.python_path, task.directory, task.job.verbose, "launcher.runners.ray_train"
    )
    with Interrupts() as interrupts, place as cluster:
        from launcher.runners import healing, ray_train

        on_event({"kind": "phase", "name": "workers"})
        task.marks.begin("workers")
        if task.job.scaling.heal and task.action == "train":
            result = healing.run(
                task,
                workers=machines.workers,
                cpus_per_worker=machines.cpus_per_worker,
                cluster=cluster,
                on_event=on_event,
                interrupts=interrupts,
            )
            return result, interrupts.signal_number
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


def cluster_of(
    cluster: ClusterConfig, python_path: Sequence[str], directory: str, verbose: bool, preload: str
) -> EmbeddedRay | ExistingRay:
    """Return the Ray that the configuration names, to be entered. preload: a module to import while it starts."""
    if cluster.kind == "existing":
        from launcher.clusters.existing import ExistingRay, address_of

        own = None if is_uri(directory) else directory  # on a store: every worker sees for itself
        gathers = directory.startswith("head://")
        return ExistingRay(address_of(cluster.address), python_path, own, verbose, cluster.env, gathers)
    from launcher.clusters.local import EmbeddedRay

    return EmbeddedRay(verbose=verbose, preload=(preload,), keep_minutes=cluster.keep_minutes)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end what is under way, until a runner takes them over to end its run in order."""
    from launcher.runners.signals import Interrupts

    class AtOnce(Interrupts):
        def _take(self, number: int, frame: Any) -> None:
            raise Stopped(number)

    with AtOnce():
        yield


def _alive(directory: RunDirectory) -> AbstractContextManager[object]:
    """Keep the run's heartbeat while workers start and read their data; they keep it themselves once they train."""
    from launcher.engine.control import Watch

    return Watch(directory)


# ---- the run's directory --------------------------------------------------------------------------------------------

_EMPTY_RESULT: dict[str, Any] = {
    "status": "running",
    "reason": None,
    "error": None,
    "steps": 0,
    "epochs": 0.0,
    "samples": 0,
    "workers": None,
    "world_sizes": [],
    "restarts": 0,
    "preemptions": 0,
    "lost_steps": 0,
    "seconds": 0.0,
    "seconds_to_first_step": None,
    "phases": None,
    "samples_per_second": None,
    "cost_usd": None,
    "checkpoint": None,
    "metrics": {},
    "best": None,
}


@dataclass(frozen=True)
class Origin:
    """Where a run comes from: what result.json says of it, and the uncommitted changes of the calling repository."""

    facts: dict[str, Any]
    patch: str

    @classmethod
    def of(cls, calling: Path) -> Origin:
        facts = {"user": provenance.user(), "versions": provenance.versions(), "git": provenance.git(calling)}
        return cls(facts, provenance.patch(calling))


class Record:
    """Writes a run's directory, and sees to it that result.json says how the run ended, whatever ended it."""

    def __init__(self, request: Request, prepared: Prepared | None = None, origin: Origin | None = None) -> None:
        self._request = request
        self._prepared = prepared
        self._origin = origin
        self._begun = False
        self.marks = Marks([("configuration", request.started)])
        self._made_root = False
        self._bill = Bill()
        self._mirrored: Mirrored | None = None

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._begun:
            # A disk that is full, or gone, must not hide the error that it led to.
            with suppress(OSError, RunError, StorageError):
                self.failed(error)

    def prepare(self) -> Prepared:
        self._prepared = prepare(self._request)
        self._mirrored = Mirrored.of(self._prepared.directory)
        if self._mirrored is not None and self._prepared.resumes:
            self._mirrored.pull()
        return self._prepared

    def begin(self, plan: Plan | None, rate: Rate | None = None) -> Task:
        """Write what is known before the start; with a plan, see whether there is room for it.

        rate: what the machines cost, where no plan says so.

        Raises:
            RunError: the directory cannot be written, is another run's by now, or has no room for a checkpoint; the
                budget of a run that is continued is spent.
        """
        from launcher.engine.entry import Task

        assert self._prepared is not None
        prepared, directory = self._prepared, self._prepared.directory
        weights = None if prepared.resumes else _weights_of(prepared.job)
        rate = plan.rate if plan is not None else rate
        earlier = directory.result() if prepared.resumes else {}
        check_budget(directory, earlier, rate)
        self._bill = Bill(float(earlier.get("seconds") or 0.0), rate)
        self._made_root = not directory.path.parent.exists()
        try:
            directory.create()
            if plan is not None:
                _check_room(directory, plan)
            self._write(prepared)
            if self._mirrored is not None:
                self._mirrored.publish()
        except FileExistsError as error:
            raise RunError(
                f'The run "{directory.name}" was started by somebody else at this moment. Choose another run.name.'
            ) from error
        except (OSError, RunError) as error:
            self._take_back(directory)
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"The run directory {directory.path} cannot be written: {error.strerror or error}. "
                "Choose another place with run.root=DIRECTORY."
            ) from error
        return Task(
            action="train",
            job=replace(prepared.job, run=replace(prepared.job.run, name=directory.name)),
            directory=directory.told(),
            python_path=[str(self._request.calling)],
            started=self._request.started,
            weights=weights,
            marks=self.marks,
            bill=self._bill,
        )

    def _write(self, prepared: Prepared) -> None:
        directory, composition = prepared.directory, prepared.composition
        # The file claims the name: of two commands at the same moment one fails here.
        if not prepared.resumes:
            directory.config.touch(exist_ok=False)
        self._begun = True
        runs.write_text(directory.config, composition.to_yaml(directory.name))
        directory.clear_requests()
        _write_words(directory, composition.shown_words(), append=prepared.resumes)
        origin = self._origin or Origin.of(self._request.calling)
        (directory.path / "code.patch").write_text(origin.patch)
        facts = origin.facts
        if prepared.resumes:
            earlier = {**_EMPTY_RESULT, **directory.result()}
            directory.write_result({**earlier, **facts, "status": "running", "reason": None, "error": None})
        else:
            directory.write_result({**_EMPTY_RESULT, **facts})
        directory.beat()

    def _take_back(self, directory: RunDirectory) -> None:
        """Leave nothing of a run that could not begin; what was there before stays."""
        assert self._prepared is not None
        if self._begun and not self._prepared.resumes:
            if self._mirrored is not None:
                with suppress(StorageError):
                    self._mirrored.remove()
            shutil.rmtree(directory.path, ignore_errors=True)
        self._begun = False
        with suppress(OSError):
            directory.path.rmdir()
        if self._made_root:
            with suppress(OSError):
                directory.path.parent.rmdir()

    def failed(self, error: BaseException, keep: bool = False) -> None:
        """Write how the run ended. keep: also what was refused before it began (a trial of a sweep) stays on disk."""
        assert self._prepared is not None
        directory = self._prepared.directory
        if self._mirrored is not None:
            with suppress(StorageError):
                self._mirrored.pull()
        checkpoint = _newest_checkpoint(directory, self._mirrored)
        refused = isinstance(error, RequestError) and error.exit_status == 2 and checkpoint is None
        if refused and not keep and not self._prepared.resumes:
            # Told before anything was trained: the name stays free for the next try.
            self._take_back(directory)
            return
        seconds = round(self._bill.seconds + time.time() - self._request.started, 3)
        usd = self._bill.spent(directory.result(), seconds)
        changes: dict[str, Any] = {"seconds": seconds, "cost_usd": usd, "checkpoint": checkpoint}
        if isinstance(error, (Stopped, KeyboardInterrupt)):
            directory.update_result(status="stopped", reason="signal", error=None, **changes)
        else:
            directory.update_result(status="failed", reason=None, error=f"{type(error).__name__}: {error}", **changes)
        self.ended(said_here=True)

    def ended(self, said_here: bool = False) -> None:
        """Put what is said of the end there where the run lies, unless rank 0 has said it, on another machine."""
        if self._mirrored is not None:
            with suppress(StorageError):
                if said_here or not self._mirrored.pull():
                    self._mirrored.push_end()


def _newest_checkpoint(directory: RunDirectory, mirrored: Mirrored | None) -> str | None:
    from launcher.engine.checkpoint import newest_intact

    if mirrored is not None:
        with suppress(StorageError):
            return mirrored.newest_checkpoint()
    newest = newest_intact(directory.checkpoints).path
    return None if newest is None else directory.told(newest)


def _check_room(directory: RunDirectory, plan: Plan) -> None:
    """Raise RunError where the disk has no room for a single checkpoint."""
    needed = plan.memory["parameters"] + plan.memory["optimizer"]
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise RunError(
            f"A checkpoint of this model takes {size(needed)}, and {directory.path.parent} has {size(free)} free. "
            "Make room, or choose another place with run.root=DIRECTORY."
        )


def check_budget(directory: RunDirectory, result: dict[str, Any], rate: Rate | None) -> None:
    """Raise RunError where a run that is to be continued has spent its budget."""
    spent = result.get("cost_usd") or 0.0
    if rate is not None and rate.budget is not None and spent >= rate.budget:
        raise RunError(f"run.resume: {money.refused(directory.name, spent, rate)}")


def _write_words(directory: RunDirectory, words: Sequence[str], append: bool) -> None:
    """Write overrides.yaml: a list of words; what a resume added follows the words that started the run."""
    lines = "".join(f"- {json.dumps(word)}\n" for word in words)
    before = directory.overrides.read_text() if append and directory.overrides.exists() else ""
    directory.overrides.write_text((before if before.strip() != "[]" else "") + lines or "[]\n")


# ---- checkpoints of other runs --------------------------------------------------------------------------------------


def _weights_of(job: Job) -> str | None:
    """Return the path of the weights that `checkpoint.load` names: the best of a run or a sweep, or a file."""
    source = job.checkpoint.load
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.is_file() or (path / "state.json").is_file():
        return str(path.absolute())
    root = root_of(job.run.root)
    try:
        run = runs.find(root, source)
    except RequestError:
        pass
    else:
        return run.told(best_checkpoint(run))
    known = [other.name for other in runs.list_runs(root)]
    raise RunError(
        f"checkpoint.load={source}: there is no such run in {root} and no such file.{did_you_mean(source, known)}"
    )


def best_checkpoint(run: RunDirectory) -> Path:
    """Return the checkpoint with the best monitored value, or the newest intact one where none is monitored.

    Raises:
        RunError: the run has none.
    """
    from launcher.engine.checkpoint import available, newest_intact, verify

    best = run.result().get("best") or {}
    if run.uri is not None:
        from launcher.engine.checkpoint.uploads import fetch

        found = fetch(run, best.get("step"))
        if found is not None:
            return found
    path = available(run.checkpoints).get(best.get("step", -1))
    if path is not None:
        verify(path)
        return path
    newest = newest_intact(run.checkpoints)
    if newest.path is None:
        raise RunError(f'The run "{run.name}" has no checkpoint that can be used. {newest.explain()}'.strip())
    return newest.path


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
        money.tell_owner(result)
        return Outcome(result, directory, control.signal_number)


def device_of(request: Request) -> str:
    """The device decides how the ranks talk to each other: known before rank 0 has prepared the run."""
    from launcher import targets

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
                plan = checked_plan(prepared.job, observer, runtime.world_size, record.marks)
                task = record.begin(plan)
            observer.prepared(prepared, plan)
            asked = prepared.job.scaling.workers
            if asked not in ("auto", runtime.world_size):
                why = f"the {runtime.world_size} processes that were started are the workers"
                observer.event({"kind": "note", "text": f"scaling.workers={asked} is ignored: {why}."})
        except LaunchError as error:
            failure = error
    failure, task = runtime.broadcast((failure, task))
    if failure is not None:
        raise failure
    return prepared, task


# ---- what the shells say and return ----------------------------------------------------------------------------------


def over_text(changes: Sequence[str]) -> str:
    return f"Over the run's own configuration: {' '.join(changes)}"


def exit_status_of(signal_number: int | None) -> int:
    """Return 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal_number or signal.SIGINT)
