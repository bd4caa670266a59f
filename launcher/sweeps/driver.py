"""The loop of a sweep: sample a trial, submit it to a warm group of workers, report, prune, record.

The loop runs in one thread, so that events are processed one after the other by Optuna, files and display.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.engine.checkpoint import available
from launcher.engine.control import PRUNE, Heartbeat
from launcher.errors import LaunchError, OutOfMemory, RequestError, RunError, Stopped, UserCodeError, WorkerLost
from launcher.formatting import duration, number
from launcher.jobs.prepare import Prepared
from launcher.jobs.record import Origin, Record
from launcher.money import BUDGET, Bill, mark_budget_spent
from launcher.planning.plan import machines_of
from launcher.runners.signals import Interrupts
from launcher.runners.tasks import Shape, TaskOutcome
from launcher.runs import REMOTE, RunDirectory, user_state
from launcher.runs.mirror import OWNER
from launcher.sweeps import records, stored
from launcher.sweeps.observer import SweepObserver, SweepOutcome
from launcher.sweeps.planning import SweepPlan, shape_of
from launcher.sweeps.progress import SweepProgress
from launcher.sweeps.runner import Runner, open_runner
from launcher.sweeps.search import display_values
from launcher.sweeps.space import Value
from launcher.sweeps.specification import save_user_record
from launcher.sweeps.study import Study

Event = dict[str, Any]
POLL_SECONDS = 0.05


@dataclass
class Trial:
    """A trial that was sampled: waiting for workers, or running.

    Attributes:
        started: time of submission.
        first_event: time of the first event of its workers, None before.
        pruning: whether its workers were requested to end it.
    """

    number: int
    values: dict[str, Value]
    shape: Shape
    record: Record
    directory: RunDirectory
    started: float = 0.0
    first_event: float | None = None
    pruning: bool = False


class Driver:
    """Runs a planned sweep until all trials have ended, or until it is requested to stop."""

    def __init__(self, sweep_plan: SweepPlan, observer: SweepObserver) -> None:
        self._sweep_plan, self._spec = sweep_plan, sweep_plan.spec
        self._observer = observer
        self._directory = sweep_plan.spec.directory
        self._study: Study
        self._progress: SweepProgress
        self._log: records.SweepLog | None = None
        self._runner: Runner
        self._origin = Origin.of(sweep_plan.spec.request.calling)
        self._trials: dict[int, Trial] = {}  # running
        self._held: Trial | None = None  # sampled, waiting for workers
        self._to_resume: list[int] = []
        self._failure: str | None = None  # the error that stops the sweep (sweep.fail_fast)
        self._began = time.time()

    def run(self) -> SweepOutcome:
        """Run the sweep.

        Raises:
            Stopped: a second signal stopped it immediately.
        """
        try:
            self._open()
            if self._progress.left() == 0:
                self._observer.begun(self._directory, replace(self._sweep_plan.headline(), finished=True))
                self._progress.show()
                return self._outcome(None)
            with stored.synced(self._directory, is_new=not self._spec.resumes):
                self._observer.begun(self._directory, self._sweep_plan.headline())
                return self._outcome(self._run())
        finally:
            if self._log is not None:
                self._log.close()

    def _run(self) -> int | None:
        """Run the trials, and return the number of the signal that stopped the sweep, or None."""
        try:
            with (
                Heartbeat(self._directory) as watch,
                open_runner(self._sweep_plan, self._observer, self._event) as (self._runner, interrupts),
            ):
                self._loop(self._runner, interrupts, watch)
            self._conclude(interrupts.signal_number, watch.stop_requested)
            return interrupts.signal_number
        except Stopped:
            self._progress.write(status="stopped", reason="signal")
            raise
        except Exception as error:
            self._progress.write(status="failed", error=f"{type(error).__name__}: {error}")
            raise

    # ---- start and end ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        spec, directory = self._spec, self._directory
        directory.create()
        directory.clear_requests()
        if spec.request.on_head is None:
            (directory.path / REMOTE).unlink(missing_ok=True)  # this machine drives it from now on
            user_state.record_cluster(directory, asdict(spec.cluster))
            save_user_record(spec)
        self._log = records.SweepLog(directory.log)
        self._study = Study(
            directory.path,
            spec.space,
            spec.settings,
            spec.objectives,
            spec.total,
            self._sweep_plan.evaluations,
            None if spec.resumes else spec.recorded,
            spec.prior,
            spec.first.job.trust,
        )
        before = float(directory.result().get("seconds") or 0.0) if spec.resumes else 0.0
        self._meter = Bill(before, self._sweep_plan.plan.rate).meter(directory.result(), self._began)
        self._progress = SweepProgress(self._sweep_plan, self._study, self._observer, self._meter, self._began, before)
        self._progress.running = self._trials.keys()
        if spec.resumes:
            self._settle_interrupted()
        if self._progress.left():
            self._progress.write(status="running", **self._origin.facts)
        self._record(f"{directory.name}: {self._sweep_plan.headline().text}")

    def _settle_interrupted(self) -> None:
        """Record the trials that ended without the previous driver, and queue the others to be resumed."""
        for trial in self._study.frozen():
            if trial.state.is_finished() or trial.state.name == "WAITING":
                continue
            run = RunDirectory(self._directory.path / str(trial.number))
            result: dict[str, Any] = {}
            with suppress(RunError):  # unreadable: the trial restarts
                result = run.result()
            self._study.reopen(trial.number)
            if result.get("status") in ("completed", "pruned", "failed"):
                self._finish(trial.number, run, result)
            else:
                self._to_resume.append(trial.number)

    def _conclude(self, signal_number: int | None, requested: bool) -> None:
        if self._failure is not None:
            self._progress.write(status="failed", error=self._failure)
        elif self._progress.left() and (signal_number or requested or self._meter.is_over):
            reason = "signal" if signal_number else "request" if requested else BUDGET
            self._progress.write(status="stopped", reason=reason)
            mark_budget_spent(self._directory.result())
        elif self._study.best() is None:
            errors = [row["error"] for row in records.rows(self._study) if row["error"]]
            error = f"No trial was completed. {errors[0] if errors else ''}".strip()
            self._progress.write(status="failed", error=error)
        else:
            self._progress.write(status="completed")
        if self._study.best() is not None:
            from launcher.sweeps.report import write_report  # imports matplotlib, which takes long

            write_report(self._directory, self._study)

    def _outcome(self, signal_number: int | None) -> SweepOutcome:
        result, found = self._directory.result(), records.best(self._study)
        return SweepOutcome(
            result,
            self._directory,
            self._progress.rows(),
            found,
            signal_number,
            self._spec.root,
            exit_rule=self._spec.settings.exit,
        )

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self, runner: Runner, interrupts: Interrupts, watch: Heartbeat) -> None:
        self._observer.event({"kind": "phase", "name": "workers"})
        stopping = False

        def stop_requested() -> bool:
            if (warning := self._meter.warning()) is not None:
                self._say(warning)
            return bool(interrupts.count or watch.stop_requested or self._failure is not None or self._meter.is_over)

        self._progress.changed()
        while True:
            if interrupts.count > 1:
                raise Stopped(interrupts.signal_number or 0)
            if not stopping and not stop_requested():
                self._submit_trials(runner)
            if not stopping and stop_requested():
                stopping = True
                runner.interrupt()
            for ended in runner.poll():
                self._ended(ended, stopping)
            if not runner.running and (stopping or (self._held is None and self._progress.left() == 0)):
                return
            time.sleep(POLL_SECONDS)

    def _submit_trials(self, runner: Runner) -> None:
        """Sample and submit trials while the runner has free workers."""
        while True:
            usual = shape_of(self._sweep_plan.plan.machines)
            if self._held is None:
                # A search samples only when workers are free, with the results of as many trials as possible.
                if self._spec.settings.sampler != "grid" and not self._to_resume and not runner.ready(usual):
                    return
                self._hold(self._next())
            trial = self._held
            if trial is None:
                runner.release()
                return
            if not runner.ready(trial.shape):
                return
            self._hold(None)
            self._begin(runner, trial)

    def _next(self) -> Trial | None:
        """Sample the next trial, or return one to resume. Trials that cannot be composed are recorded as failed."""
        while True:
            if self._to_resume:
                number = self._to_resume.pop(0)
                self._study.reopen(number)
            elif (fresh := self._study.ask()) is not None:
                number = fresh
            else:
                return None
            values = self._study.values(self._study.frozen()[number])
            run = RunDirectory(self._directory.path / str(number))
            try:
                composition = self._spec.compose(values)
                shape = shape_of(machines_of(composition.job))
            except RequestError as error:
                run.create()
                run.write_result({"status": "failed", "error": f"{type(error).__name__}: {error}"})
                self._finish(number, run, run.result())
                continue
            job = composition.job
            job.run.name, job.run.root = str(number), self._directory.display_path()
            job.logging.hparams = display_values(values, self._spec.space)
            resumes = run.config.is_file()
            if resumes:
                composition = replace(composition, words=[])  # overrides.yaml exists already
            prepared = Prepared(composition, run, resumes=resumes)
            record = Record(replace(self._spec.request, started=time.time()), prepared, self._origin)
            return Trial(number, values, shape, record, run)

    def _begin(self, runner: Runner, trial: Trial) -> None:
        trial.started = time.time()
        try:
            task = trial.record.begin(None, self._sweep_plan.rate_of(trial.shape), self._spec.root)
        except RequestError as error:  # weights of checkpoint.load are missing, or the disk is full
            trial.directory.create()
            trial.directory.update_result(status="failed", error=f"{type(error).__name__}: {error}")
            self._finish(trial.number, trial.directory, trial.directory.result())
            return
        task.directory, task.started = self._spec.task_directory(trial.directory), trial.started
        if trial.directory.uri is None:
            (trial.directory.path / OWNER).unlink(missing_ok=True)  # workers use the files of this directory
        self._study.already_evaluated(trial.number, records.evaluated_at(trial.directory, self._spec.objectives[0].tag))
        self._trials[trial.number] = trial
        words = " ".join(self._spec.space.overrides(trial.values))
        self._record(f"trial {trial.number} begins: {words}")
        self._progress.changed()
        runner.submit(str(trial.number), task, trial.shape)

    def _event(self, key: str, event: Event) -> None:
        """Process an event of a trial. After an evaluation the trial may be pruned."""
        trial = self._trials[int(key)]
        trial.first_event = trial.first_event or time.time()
        tag = self._spec.objectives[0].tag
        value = event["values"].get(tag) if event["kind"] == "progress" else None
        if value is not None and self._study.report(trial.number, event["step"], value) and not trial.pruning:
            trial.pruning = True
            self._runner.request(key, PRUNE)
        self._observer.trial(trial.number, event)

    # ---- ends of trials ---------------------------------------------------------------------------------------------

    def _ended(self, ended: TaskOutcome, stopping: bool) -> None:
        trial = self._trials.pop(int(ended.key))
        run = trial.directory
        stored.pull_trial(run)
        if ended.interrupted:
            run.update_result(status="stopped", reason="signal")
        elif ended.error is not None:
            if self._retry(trial, ended.error, stopping):
                return
            trial.record.failed(ended.error, keep=True)
            if isinstance(ended.error, UserCodeError) and ended.error.traceback_text:
                self._record(ended.error.traceback_text.rstrip())
        result = run.result()
        if result.get("status") == "stopped" and stopping:
            stored.push_trial(run)
            self._record(f"trial {trial.number} is interrupted at step {result.get('steps')}")
            self._progress.changed()
            return
        self._progress.durations.append(time.time() - (trial.first_event or trial.started))
        self._finish(trial.number, run, result)

    def _retry(self, trial: Trial, error: LaunchError, stopping: bool) -> bool:
        """Queue a trial that lost a worker to be resumed, at most `checkpoint.max_failures` times without progress."""
        if not isinstance(error, WorkerLost) or isinstance(error, OutOfMemory) or stopping:
            return False
        attributes, most = self._study.frozen()[trial.number].user_attrs, self._spec.first.job.checkpoint.max_failures
        stored_at = stored.newest_checkpoint(trial.directory)
        saved = max(available(trial.directory.checkpoints), default=0) if stored_at is None else stored_at
        progressed = saved > attributes.get("retried_from", -1)
        failures = 1 if progressed else attributes.get("retries", 0) + 1  # consecutive
        if failures > most:
            return False
        self._study.note(trial.number, "retries", failures)
        self._study.note(trial.number, "retried_from", saved)
        self._to_resume.append(trial.number)
        cause = str(error).partition(" Continue the run ")[0]  # without the remedy, which is applied here
        self._say(f"trial {trial.number}: {cause} It resumes (consecutive failure {failures} of at most {most}).")
        return True

    def _finish(self, trial: int, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Record the end of a trial in the study, and update all files."""
        status, error = str(result.get("status")), result.get("error")
        tags = [objective.tag for objective in self._spec.objectives]
        found = [(result.get("metrics") or {}).get(tag) for tag in tags]
        values = [value for value in found if value is not None and math.isfinite(value)]
        if status == "completed" and len(values) < len(tags):
            status, error = "failed", f"{tags[len(values)]} was not logged, or is not a finite number."
        state = "pruned" if status == "stopped" else status  # `launch stop` of a single trial prunes it
        facts = {"seconds": result.get("seconds"), "steps": result.get("steps"), "error": error}
        self._study.finish(trial, state, values, facts)
        frozen = self._study.frozen()[trial]
        parameters = display_values(self._study.values(frozen), self._spec.space)
        reached = records.objective(frozen)
        about = {"number": trial, "parameters": parameters, "objective": reached}
        run.update_result(trial=about, **({"status": "failed", "error": error} if state == "failed" else {}))
        stored.push_trial(run)
        if state == "failed":
            self._say(f"trial {trial} failed: {error}")
            if self._spec.settings.fail_fast:
                self._failure = f"Trial {trial} failed, and sweep.fail_fast=true: {error}"
        else:
            numbers = reached if isinstance(reached, list) else [] if reached is None else [reached]
            values_text = "  ".join(f"{tag} {number(value)}" for tag, value in zip(tags, numbers, strict=False))
            words = " ".join(self._spec.space.overrides(self._study.values(frozen)))
            took = duration(float(result.get("seconds") or 0.0))
            self._say(f"trial {trial} {state} after {result.get('steps')} steps in {took}  {values_text}  {words}")
        if self._spec.settings.keep == "best":
            ended = [other.number for other in self._study.frozen() if other.state.is_finished()]
            records.delete_checkpoints(self._directory, self._study, ended)
        self._progress.changed()

    def _hold(self, trial: Trial | None) -> None:
        """Keep a sampled trial that waits for workers."""
        self._held = trial
        self._progress.held = None if trial is None else trial.number

    def _record(self, text: str) -> None:
        """Write a line to the log of the sweep."""
        assert self._log is not None
        self._log.line(text)

    def _say(self, text: str) -> None:
        self._record(text)
        self._observer.say(text)
