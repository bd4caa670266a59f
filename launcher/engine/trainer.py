"""The training loop: one global batch after another, independent of the number of workers.

The constructor builds in the order of dependence: data, strategy, optimizer, schedule, state. Then, for each global
batch: step, log, evaluate, save. Two rules hold throughout: the share of a rank is computed when a step begins, from
the rank facts of that moment, and the update is applied after all ranks have voted on the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from launcher.config import Job
from launcher.engine import hardware
from launcher.engine.advice import advise
from launcher.engine.auto_strategy import resolve_strategy
from launcher.engine.build import build_evaluator, build_loader, build_order, build_split, build_strategy
from launcher.engine.callbacks import Callbacks, Run, build_callbacks
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.control import Control, Heartbeat
from launcher.engine.datasets import Data
from launcher.engine.drawing import traced_step
from launcher.engine.drift import Drift
from launcher.engine.examples import Examples
from launcher.engine.finite import Finite
from launcher.engine.global_batches import GlobalBatch, GlobalBatches
from launcher.engine.metrics import Sums, means
from launcher.engine.optim import build_optimizer, learning_rate, parameter_groups
from launcher.engine.pace import Pace
from launcher.engine.peaks import share_of_a_sample
from launcher.engine.performance import Performance
from launcher.engine.profile import StepTrace
from launcher.engine.progress import Progress, StepResult
from launcher.engine.record import Recorder
from launcher.engine.requests import Ending, Intervals, Requests, asks_to_save, ending_of
from launcher.engine.run_checkpoints import RunCheckpoints
from launcher.engine.runtime import Runtime
from launcher.engine.schedules import Schedule
from launcher.engine.sinks.base import chosen_sinks
from launcher.engine.state import State
from launcher.engine.steps import StepInfo, call_training_step
from launcher.engine.strategies.strategy import DTYPES, casting
from launcher.engine.stream import StreamLoader
from launcher.engine.throughput import Throughput
from launcher.engine.trained_parameters import TrainedParameters
from launcher.errors import Regroup
from launcher.money import Bill
from launcher.runs import RunDirectory
from launcher.startup_timing import Marks


class Trainer:
    """One rank's part of a training run.

    Args:
        job: the configuration.
        runtime: the rank, device and process groups.
        control: provides requests and receives events.
        directory: the run's directory.
        data: the job's data sets.
        model: the network, initialised, on the device.
        started: wall-clock time of the user's command.
        marks: the startup phases since then.
        uploads: where checkpoints are sent, when the run root is an object store.
        bill: the seconds of the run before this command, and the price of its machines.
    """

    def __init__(
        self,
        job: Job,
        runtime: Runtime,
        control: Control,
        directory: RunDirectory,
        data: Data,
        model: nn.Module,
        started: float,
        marks: Marks | None = None,
        uploads: Uploads | None = None,
        bill: Bill | None = None,
    ) -> None:
        trainer, groups = job.trainer, job.optimizer.get("groups") or []
        self.runtime, self.control, self.directory = runtime, control, directory
        self._started, self._marks, self._bill = started, marks or Marks(), bill or Bill()
        self.progress, self.throughput, self.pace = Progress(), Throughput(), Pace(control.emit)

        order, split, loader = build_order(job, data), build_split(job), build_loader(job, data, runtime, model)
        self.steps_per_epoch = order.steps_per_epoch
        self.total_steps = trainer.steps or trainer.epochs * order.steps_per_epoch
        self.batches = GlobalBatches(order, split, loader, runtime, self.progress, self.throughput, self.total_steps)
        self.first_batch = self.batches.first()

        parameter_groups(model, groups)  # freezes parameters, which must precede wrapping
        first_step = StepInfo.following(self.progress, self.total_steps, runtime)
        cast, passes = partial(casting, runtime.device, DTYPES[trainer.precision]), self.batches.passes
        compute = partial(call_training_step, model, self.first_batch, first_step, cast)
        job, measured = resolve_strategy(job, model, compute, passes, runtime, directory, control)
        self.job = job
        self.strategy = build_strategy(job, model, runtime)
        self.advice = advise(job, model, compute, passes, runtime, measured)
        self.strategy.begin(self.progress, self.total_steps)
        self.sums = Sums(runtime.device, trainer.deterministic)
        self.sums.add(self.strategy.prepare(self.first_batch))  # declares the names of the metrics on every rank
        self.sums.reset()
        may_fuse = self.strategy.uses_all and not self.strategy.sparse
        self.optimizer = build_optimizer(job.optimizer, model, job.trust, may_fuse, may_change=bool(job.callbacks))
        self.strategy.attach(self.optimizer, self.total_steps)
        self.trained = TrainedParameters(model, self.optimizer, self.strategy, groups)
        self.drift = Drift(runtime, runtime.gather(hardware.kind_of(runtime.device)), self._note)
        length, monitored = (self.total_steps, self.steps_per_epoch), (job.checkpoint.monitor, job.checkpoint.mode)
        self.schedule = Schedule(job.scheduler, self.optimizer, *length, *monitored, job.trust)
        self.learning_rate = learning_rate(self.optimizer)
        self.evaluator = build_evaluator(job, self.strategy, runtime, data, "val", directory.path, monitored[0])
        run = Run(model, self.optimizer, self.progress, runtime, directory.path, self.total_steps)
        self.callbacks = Callbacks(build_callbacks(job), run, runtime)

        restored = (self.schedule, self.strategy, self.callbacks, self.trained, self.sums, self.progress)
        state = State(model, self.optimizer, *restored, runtime, trainer.seed)
        self.checkpoints = RunCheckpoints(
            state, self.progress, self.schedule, runtime, directory, control, job.checkpoint.keep, uploads
        )
        again = None if isinstance(loader, StreamLoader) else self.batches.again
        self.finite = Finite(runtime, self.strategy, again, self.checkpoints.describe_newest)
        self.intervals, self.heartbeat = Intervals.of(job), Heartbeat(directory)
        self.requests = Requests(control, runtime, self.heartbeat, self.callbacks, self.finite, self.intervals)
        peak_share = share_of_a_sample(model, runtime.device, trainer.precision)
        measures = (self.throughput, self.pace, trainer.global_batch_size, peak_share, self.advice)
        self.performance = Performance(runtime, *measures, uploads)
        self.trace = StepTrace(job.logging.profile, directory.path, runtime, self._note)
        self.sinks = chosen_sinks(job)
        self.shows_figures = any(kind.visual for kind in self.sinks)
        self.recorder: Recorder | None = None  # of rank 0, once it trains

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a request stops the run. Return the content of result.json on rank 0, else {}.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the last good checkpoint is kept.
            DataError, UserCodeError: a batch could not be read or computed.
            CheckpointError: a checkpoint could not be written.
            Regroup: all ranks have saved and end, as requested.
        """
        resumed_at = self.checkpoints.resume()
        if self.runtime.broadcast(resumed_at is not None):
            self.first_batch = None  # the record already has the graph of the network
        if self.advice is not None and (line := self.advice.line()):
            self._note(line)
        with self._recording(resumed_at):
            try:
                return self._finish(self._train())
            except Exception:
                self.checkpoints.settle()
                raise

    def _train(self) -> Ending:
        self.control.emit({"kind": "phase", "name": "training"})
        self._call("on_start")
        self.throughput.restart()
        with closing(self.trace), closing(self.batches):
            for batch in self.batches:
                result = self._step(batch)
                self._log(result)
                self._evaluate(result)
                self._write(result)
                self._save(result)
                if self._is_last_step:
                    break
                if ending := ending_of(result.votes, result.reason):
                    return ending
                if result.votes["regroup"]:
                    self._leave_to_regroup()
        return Ending()

    def _step(self, batch: GlobalBatch) -> StepResult:
        """Do one optimizer step over a global batch."""
        step = self.progress.step + 1
        self.trace.before(step)
        self.strategy.begin(self.progress, self.total_steps)
        flags = self.requests.flags()
        if self.trained.stale:
            self.trained.rewrap(self.runtime, flags, self.batches.first, self.progress.step)
        vote = self.strategy.accumulate(batch.microbatches, batch.size, flags, self._add)
        if vote.votes["bad"] or vote.votes["gradient"] or self.finite.note_gradients(step):
            self.finite.fail(step, flags["bad"], flags["gradient"])
        self.strategy.apply(self.optimizer, batch.size, vote)
        self.learning_rate = learning_rate(self.optimizer)
        self.progress.advance(batch.size, self.steps_per_epoch)
        self.schedule.step(epoch_ended=self.progress.batch == 0)
        self.throughput.step(batch.size)
        self._show_progress()
        self._call("on_step")
        return StepResult(vote.votes)

    def _add(self, answer: Any) -> None:
        """Add the result of a microbatch to the sums of the log interval."""
        self.sums.add(answer)
        self.finite.note_loss(answer, self.progress.step + 1)

    def _log(self, result: StepResult) -> None:
        """Reduce the sums of the log interval over all workers, if a log is due."""
        if not (self._is_last_step or result.votes["log"] or self.intervals.log.due(self.progress)):
            return
        totals = self.sums.reduce(self.runtime)
        self.finite.check_totals(totals, self.progress.step)
        self.drift.check(self.trained.copy(), self.progress.step)
        self.sums.reset()
        result.values.update({f"train/{name}": value for name, value in means(totals).items()})
        result.values["train/learning_rate"] = self.learning_rate
        result.values["train/grad_norm"] = float(self.strategy.grad_norm())
        result.values.update(self.performance.interval(self.progress, self.checkpoints.last))
        if self.recorder is not None:
            result.values.update(self.recorder.meter.tags())

    def _evaluate(self, result: StepResult) -> None:
        """Evaluate if it is due, and let the ranks agree on a stop that a callback requests."""
        votes = result.votes
        due = self._is_last_step or votes["evaluate"] or self.intervals.evaluate.due(self.progress)
        evaluator = self.evaluator if due else None
        if evaluator is not None:
            self.strategy.merge_buffers()
            weights = (self.callbacks.evaluated(), self.strategy.evaluation_weights())
            with self.throughput.pause(), self.pace.evaluation(), weights[0], weights[1]:
                result.values.update(evaluator.run())
        self.progress.metrics.update(result.values)
        if evaluator is not None:
            self.schedule.evaluated(self.progress.metrics)
            self._call("on_evaluate")
        if evaluator is not None or votes["callback"]:
            result.reason = self.callbacks.agree_to_stop()
        monitored = result.values.get(self.job.checkpoint.monitor or "")
        result.improved = monitored is not None and self.progress.improve(monitored, self.job.checkpoint.mode)

    def _write(self, result: StepResult) -> None:
        """Write the tags of this step, including those of callbacks, and pass them to the callbacks."""
        values = {**self.callbacks.take_logged(), **result.values}
        if not values:
            return
        if self.recorder is not None:
            self.recorder.log(self.progress, self.throughput, values)
        self._call("on_log", self.progress.step, values)

    def _save(self, result: StepResult) -> None:
        """Save if it is due or requested, unless this step is saved already."""
        due = self._is_last_step or result.reason or result.improved or self.intervals.save.due(self.progress)
        if due:
            # Not on request: an uninterrupted run would not merge them here.
            self.strategy.merge_buffers()
        if not (due or asks_to_save(result.votes)) or self.checkpoints.saved_step == self.progress.step:
            return
        with self.throughput.pause():
            if self.runtime.device.type == "cuda":  # on the CPU each step has been checked
                self.finite.check_totals(self.sums.reduce(self.runtime), self.progress.step)
            self.finite.check_weights(self.progress.step)
            self.checkpoints.save()

    @property
    def _is_last_step(self) -> bool:
        return self.progress.step == self.total_steps

    # ---- callbacks and the record -----------------------------------------------------------------------------------

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call `hook` of all callbacks, which may change the trained parameters."""
        if not self.callbacks:
            return
        before = self.trained.flags()
        self.callbacks.call(hook, *arguments)
        if line := self.trained.follow(before, f"{hook} of a callback", self.progress.step):
            self._note(line)

    def _note(self, text: str) -> None:
        """Print a line for the user, on rank 0 only."""
        if self.runtime.is_first:
            self.control.emit({"kind": "note", "text": text})

    @contextmanager
    def _recording(self, resumed_at: int | None) -> Iterator[None]:
        """On rank 0, write the run's record and its heartbeat inside the context."""
        if not self.runtime.is_first:
            yield
            return
        self.recorder = recorder = Recorder(
            self.directory,
            self.job,
            self.control,
            started=self._started,
            marks=self._marks,
            bill=self._bill,
            machines=self.runtime.machines or self.runtime.world_size // self.runtime.local_world_size,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            resumed_at=resumed_at,
            sinks=[kind() for kind in self.sinks],
        )
        self.requests.over_budget = recorder.money_is_spent
        if self.evaluator is not None and self.shows_figures:
            self.evaluator.examples = Examples(
                self.strategy.model,
                lambda values: recorder.figures(values, self.progress.step),
                self._note,
                self.job.trainer.seed,
            )
        with closing(recorder), self.heartbeat:
            yield

    def _show_progress(self) -> None:
        drawing = self._drawing()
        if self.recorder is not None:
            if self.recorder.seconds_to_first_step is None:
                with self.throughput.pause():
                    self.recorder.first_step(drawing)
            self.recorder.step(self.progress, self.throughput)

    def _drawing(self) -> tuple[Any, tuple[torch.Tensor, ...]] | None:
        """Return the traced network after the first step of a new run, for the sinks; every rank traces it."""
        batch, self.first_batch = self.first_batch, None  # free its memory
        if batch is None or not (self.shows_figures and self.job.logging.graph):
            return None
        with self.throughput.pause():
            return traced_step(self.strategy.drawable(), batch, self.runtime.device, self.strategy.info)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _leave_to_regroup(self) -> NoReturn:
        """Raise Regroup after the checkpoint of all ranks is complete."""
        self.checkpoints.wait()
        self.runtime.barrier()
        raise Regroup(
            f"All workers have saved step {self.progress.step} and end, so that a new group of workers can start."
        )

    def _finish(self, ending: Ending) -> dict[str, Any]:
        self.callbacks.call("on_end")
        logged = self.callbacks.take_logged()
        saved = self.checkpoints.wait()
        self.checkpoints.close()
        if self.recorder is None:
            return {}
        if logged:
            self.recorder.log(self.progress, self.throughput, logged)
        checkpoint = saved.path if saved else self.checkpoints.newest_here().path
        status, reason = ending.status, ending.reason
        return self.recorder.result(self.progress, self.throughput, status=status, reason=reason, checkpoint=checkpoint)
