"""The training loop: one global batch after another, whatever the number of workers.

Construction order tells the story: seed, data, model, strategy, optimizer, schedule, state. Two seams are kept here:
the shares of a global batch are computed at the start of each step from the rank facts of that moment, and the update
is applied after all ranks have voted on the step; requests to stop or to save travel with the same vote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from launcher.config import Job, parse_interval
from launcher.engine import hardware
from launcher.engine.advice import advise
from launcher.engine.auto import settle
from launcher.engine.build import (
    build_evaluator,
    build_loader,
    build_order,
    build_split,
    build_strategy,
)
from launcher.engine.callbacks import Callbacks, Run, build_callbacks
from launcher.engine.checkpoint import Checkpointer, Newest
from launcher.engine.checkpoint.uploads import Uploads
from launcher.engine.control import CHECKPOINT, PRUNE, REGROUP, STOP, Control, Watch
from launcher.engine.datasets import Data
from launcher.engine.drawing import traced_step
from launcher.engine.drift import Copy, Drift
from launcher.engine.examples import Examples
from launcher.engine.finite import Finite
from launcher.engine.metrics import Sums, means
from launcher.engine.optim import build_optimizer, learning_rate, parameter_groups
from launcher.engine.order import keys_of_training
from launcher.engine.pace import Pace
from launcher.engine.peaks import share_of_a_sample
from launcher.engine.profile import StepTrace
from launcher.engine.progress import Done, Every, Progress
from launcher.engine.record import Recorder, StepFile, Throughput
from launcher.engine.runtime import Runtime
from launcher.engine.schedules import Schedule
from launcher.engine.state import State
from launcher.engine.strategies.strategy import DTYPES, casting
from launcher.engine.stream import StreamLoader
from launcher.engine.trained import Trained
from launcher.engine.weights import load_weights_into
from launcher.errors import CheckpointError, NonFiniteLoss, Regroup, TrainingError
from launcher.money import BUDGET, Bill
from launcher.phases import Marks
from launcher.runs import RunDirectory

SETTLE_SECONDS = 60.0  # how long a run that fails waits for a save that goes on; other ranks may be gone


class Trainer:
    """One rank's part of a training run.

    Args:
        job: the configuration.
        runtime: who this rank is.
        control: requests in, events out.
        directory: the run on disk.
        data: the job's data sets.
        model: the network, initialised, on the device.
        started: wall-clock time of the user's command.
        marks: the phases since then.
        uploads: where checkpoints are sent, when the run root is an object store.
        bill: the seconds of the run before this command, and what its machines cost.
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
        trainer = job.trainer
        self.runtime, self.control, self.directory = runtime, control, directory
        self.order = build_order(job, data)
        self.split = build_split(job)
        self.total_steps = trainer.steps or trainer.epochs * self.order.steps_per_epoch

        self.loader = build_loader(job, data, runtime, model)
        self.first_batch = self._first_batch()

        parameter_groups(model, job.optimizer.get("groups") or [])  # freezes, which wrapping must know
        n = runtime.world_size
        # Of the worker with most: all wait for it, and another may have none.
        shares = (self.split.share(self.order.batch_size(0), rank, n) for rank in range(n))
        passes = max(len(share) for share in shares)
        cast = partial(casting, runtime.device, DTYPES[trainer.precision])
        job, measured = settle(job, model, self.first_batch, passes, runtime, directory, control, cast)
        self.job = job
        self.strategy = build_strategy(job, model, runtime)
        self.advice = advise(job, model, self.first_batch, passes, runtime, cast, measured)
        self.sums = Sums(runtime.device, trainer.deterministic)
        self.sums.add(self.strategy.prepare(self.first_batch))  # every rank knows the names from here on
        self.sums.reset()
        may_fuse = self.strategy.uses_all and not self.strategy.sparse
        self.optimizer = build_optimizer(job.optimizer, model, job.trust, may_fuse, may_change=bool(job.callbacks))
        self.strategy.attach(self.optimizer, self.total_steps)
        self.trained = Trained(model, self.optimizer, self.strategy, job.optimizer.get("groups") or [])
        self.drift = Drift(runtime, runtime.gather(hardware.kind_of(runtime.device)), self._say)
        length = self.total_steps, self.order.steps_per_epoch
        monitored = job.checkpoint.monitor, job.checkpoint.mode
        self.schedule = Schedule(job.scheduler, self.optimizer, *length, *monitored, job.trust)
        self.evaluator = build_evaluator(job, self.strategy, runtime, data, "val")

        self.progress = Progress()
        run = Run(model, self.optimizer, self.progress, runtime, directory.path, self.total_steps)
        self.callbacks = Callbacks(build_callbacks(job), run, runtime)
        self.state = State(
            model,
            self.optimizer,
            self.schedule,
            self.strategy,
            self.callbacks,
            self.trained,
            self.sums,
            self.progress,
            runtime,
            trainer.seed,
        )
        self.uploads = uploads
        self.checkpointer = Checkpointer(
            directory.checkpoints, keep=job.checkpoint.keep, group=runtime.new_host_group(), uploads=uploads
        )
        self.throughput = Throughput()
        self._pace = Pace(control.emit)
        self._share = share_of_a_sample(model, runtime.device, trainer.precision)
        self._trace = StepTrace(job.logging.profile, directory.path, runtime)
        self.log_every, self.evaluate_every, self.save_every = (
            Every(parse_interval(value, key))
            for key, value in (
                ("trainer.log_every", trainer.log_every),
                ("trainer.evaluate_every", trainer.evaluate_every),
                ("checkpoint.every", job.checkpoint.every),
            )
        )
        self._started, self._marks, self._bill = started, marks or Marks(), bill or Bill()
        self._recorder: Recorder | None = None
        self._saved_step: int | None = None
        self._continues = True
        self._flags: dict[str, bool] = {}
        self._reason: str | None = None
        self._rate = learning_rate(self.optimizer)
        self._batches: Generator[Any] | None = None
        self._ranks = (runtime.rank, runtime.world_size)
        again = None if isinstance(self.loader, StreamLoader) else self._microbatches
        self.finite = Finite(runtime, self.strategy, again)

    def _first_batch(self) -> Any:
        """Return rank 0's first microbatch of the first global batch, on every rank."""
        (start, stop), *_ = self.split.share(self.order.batch_size(0), 0, self.runtime.world_size)
        return next(self.loader.once(0, self.order.epoch(0)[start:stop], start))

    def begin_with(self, weights: dict[str, torch.Tensor], source: str) -> None:
        """Begin with the weights of `source` (`checkpoint.load`); a run that is resumed has its own instead."""
        left_out = load_weights_into(self.strategy.model, weights, source, self.job.checkpoint.load_strict)
        if left_out and self.runtime.is_first:
            self.control.emit({"kind": "note", "text": f"Weights of {source}: {left_out}."})

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until somebody asks to stop. Returns result.json's content (empty but on rank 0).

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the last good checkpoint is kept.
            DataError, UserCodeError: reading or computing a batch failed.
            CheckpointError: a checkpoint could not be written.
            Regroup: all ranks have saved and end, as they were asked to.
        """
        resumed_at = self._resume()
        self._continues = self.runtime.broadcast(resumed_at is not None)
        if self.advice is not None and self.runtime.is_first and (line := self.advice.line()):
            self.control.emit({"kind": "note", "text": line})
        watch = Watch(self.directory)
        if not self.runtime.is_first:
            return self._loop_and_settle(watch)
        self._record_from(resumed_at)
        try:
            with watch:
                return self._loop_and_settle(watch)
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def _record_from(self, step: int | None) -> None:
        """Keep the run's record from here on; see `Recorder`."""
        self._recorder = Recorder(
            self.directory,
            self.job,
            self.control,
            started=self._started,
            marks=self._marks,
            bill=self._bill,
            machines=self.runtime.machines or self.runtime.world_size // self.runtime.local_world_size,
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            resumed_at=step,
        )
        if self.evaluator is not None and self.job.logging.tensorboard:
            self.evaluator.examples = Examples(
                self.strategy.model,
                lambda values: self._recorder.examples(self.progress.step, values) if self._recorder else None,
                lambda text: self.control.emit({"kind": "note", "text": text}),
                self.job.trainer.seed,
            )

    def _resume(self) -> int | None:
        """Continue from the newest intact checkpoint, when there is one.

        Returns the step that rank 0's record continues from: 0 where a run was lost before its first checkpoint, None
        for a new run.
        """
        newest = self._newest()
        if newest.path is not None:
            self.state.load(newest.path)
            self._saved_step = self.progress.step
        else:
            self.state.seed_rank()
        goes_on = self.runtime.is_first and self._note_restart(newest)
        self.progress.joined(self.runtime.world_size)
        if not goes_on:
            return self._saved_step
        counters = ("restarts", "preemptions", "lost_steps", "world_sizes")
        self.directory.update_result(**{name: getattr(self.progress, name) for name in counters})
        return self.progress.step

    def _newest(self) -> Newest:
        """The newest intact checkpoint, looked for by rank 0 after a save that may still go on."""
        with suppress(CheckpointError):  # told where it matters; here the question is what there is
            self.checkpointer.wait()
        found = self.runtime.broadcast(self._newest_here().to_dict() if self.runtime.is_first else None)
        return self.checkpointer.here(Newest.from_dict(found))

    def _newest_here(self) -> Newest:
        return self.checkpointer.newest()

    def _note_restart(self, newest: Newest) -> bool:
        """Count the steps that were lost, and tell. Returns whether the run has been here before."""
        progress = self.progress
        done = StepFile(self.directory.path)
        steps_done = done.read()
        done.close()
        if newest.path is None and not newest.skipped and not steps_done and self.runtime.attempt == 1:
            return False
        lost = max(0, steps_done - progress.step)
        # What restarts after that checkpoint have counted stands in result.json alone.
        earlier = self.directory.result()
        for name, causes in (("restarts", ("", "failure")), ("preemptions", ("preemption",))):
            before = max(getattr(progress, name), earlier.get(name) or 0)
            setattr(progress, name, before + (self.runtime.cause in causes))
        progress.lost_steps = max(progress.lost_steps, earlier.get("lost_steps") or 0) + lost
        progress.world_sizes = max(progress.world_sizes, list(earlier.get("world_sizes") or []), key=len)
        again = f"; {lost} step(s) done since are done again" if lost else ""
        parts = (f"Continuing from step {progress.step}{again}.", newest.explain(), self.schedule.note)
        text = " ".join(part for part in parts if part)
        self.control.emit({"kind": "note", "text": text})
        self.control.emit({"kind": "resumed", "step": progress.step})
        return True

    def _loop_and_settle(self, watch: Watch) -> dict[str, Any]:
        try:
            return self._loop(watch)
        except Exception:
            self.checkpointer.settle(SETTLE_SECONDS)  # what is being saved is the last good checkpoint
            raise

    def _loop(self, watch: Watch) -> dict[str, Any]:
        self.control.emit({"kind": "phase", "name": "training"})
        self._call("on_start")
        self.throughput = Throughput()
        status = "completed"
        try:
            while self.progress.step < self.total_steps:
                done = self._step(watch)
                self._after_step(done)
                stop, prune = done.ballots["stop"] > 0, done.ballots["prune"] > 0
                if (stop or prune or done.reason) and self.progress.step < self.total_steps:
                    status = "stopped" if stop else "pruned" if prune else "completed"
                    self._reason = done.reason
                    if stop:
                        self._reason = next((why for why in ("signal", BUDGET) if done.ballots[why]), "request")
                    break
                if done.ballots["regroup"] and not self._ended:
                    self._leave_to_regroup()
        finally:
            self._close_batches()  # here and not when the garbage is collected: loader processes end with it
            self._tell_of_trace(self._trace.close())
        return self._finish(status)

    def _step(self, watch: Watch) -> Done:
        """Do one optimizer step over the next global batch."""
        facts = (self.runtime.rank, self.runtime.world_size)
        if self._batches is None or facts != self._ranks:
            self._close_batches()
            self._batches, self._ranks = self._timed(self._read_from_here()), facts
        size = self.order.batch_size(self.progress.batch)
        share = self.split.share(size, *facts)
        self._tell_of_trace(self._trace.before(self.progress.step + 1))
        self._flags = self._wishes(watch)
        if self.trained.stale:
            self._rewrap()
        vote = self.strategy.accumulate(islice(self._batches, len(share)), size, self._flags, self._record)
        bad = vote.ballots["bad"] or vote.ballots["gradient"]
        if bad or self.finite.note_gradients(self.progress.step + 1):
            self._fail_non_finite()
        self.strategy.apply(self.optimizer, size, vote)
        self._rate = learning_rate(self.optimizer)
        self.progress.advance(size, self.order.steps_per_epoch)
        self.schedule.step(epoch_ended=self.progress.batch == 0)
        return Done(size, vote.ballots)

    def _close_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _tell_of_trace(self, path: Path | None) -> None:
        if path is not None and self.runtime.is_first:
            text = f"The trace of the chosen steps is in {path.parent}: open a file of it in https://ui.perfetto.dev."
            self.control.emit({"kind": "note", "text": text})

    def _read_from_here(self) -> Generator[Any]:
        p, r = self.progress, self.runtime
        keys = keys_of_training(
            self.order, self.split, r.rank, r.world_size, p.epoch, p.batch, last_step=self.total_steps, step=p.step
        )
        return self.loader.read(keys, at=p.step)

    def _timed(self, batches: Generator[Any]) -> Generator[Any]:
        with closing(batches):
            while True:
                before, busy = time.perf_counter(), self.loader.transforming
                batch = next(batches, None)
                self.throughput.waited(time.perf_counter() - before - (self.loader.transforming - busy))
                if batch is None:
                    return
                yield batch

    def _wishes(self, watch: Watch) -> dict[str, bool]:
        """What this rank wants of all ranks after the step that begins."""
        requests = self.control.requests()
        first = self.runtime.is_first
        spent = BUDGET in requests or (self._recorder is not None and self._recorder.money_is_spent())
        return {
            "overflow": False,  # raised by the strategy of deterministic mode
            "trained": False,
            "gradient": self.finite.gradient_was_bad,
            "bad": False,  # raised by the strategy where this rank's loss is not finite
            "stop": STOP in requests or watch.stop_requested or spent,
            "signal": STOP in requests,
            BUDGET: spent,
            "prune": PRUNE in requests,
            "regroup": REGROUP in requests,
            "checkpoint": CHECKPOINT in requests or (first and self.save_every.time_is_up()),
            "callback": self.callbacks.wants_to_stop,
            "log": first and self.log_every.time_is_up(),
            "evaluate": first and self.evaluate_every.time_is_up(),
        }

    def _call(self, hook: str) -> None:
        """Call `hook` of all callbacks, which may change what is trained."""
        if not self.callbacks:
            return
        before = self.trained.flags()
        self.callbacks.call(hook)
        line = self.trained.follow(before, f"{hook} of a callback", self.progress.step)
        if line is not None and self.runtime.is_first:
            self._say(line)

    def _rewrap(self) -> None:
        """Wrap the model anew, since other parameters are trained; every rank must have come here."""
        # In the form of a step's vote: a rank that has not changed anything meets it with its own, and nothing hangs.
        vote = self.runtime.vote(0.0, {name: name == "trained" for name in self._flags}).wait()
        if (
            vote.ballots["trained"] < self.runtime.world_size
            or len(set(map(tuple, self.runtime.gather(self.trained.flags())))) > 1
        ):
            raise TrainingError(
                f"A callback changed which parameters are trained at step {self.progress.step}, and not alike on every "
                "rank. Change requires_grad on all ranks: callbacks run on every one of them."
            )
        self.strategy.rewrap(self._first_batch())
        self.trained.stale = False

    def _say(self, text: str) -> None:
        self.control.emit({"kind": "note", "text": text})

    def _check_replicas(self) -> None:
        """Compare the ranks' copies of the model; see `drift`."""
        trained, strategy, names = self.trained, self.strategy, self.trained.name_of
        weights = [(names[id(p)], tensor) for p, tensor in strategy.replicated()]
        graded = trained.graded() if strategy.shares_gradients else None
        self.drift.check(Copy(weights, trained.names(), graded, trained.unexpected()), self.progress.step)

    def _record(self, answer: Any) -> None:
        self.sums.add(answer)
        self.finite.note_loss(answer, self.progress.step + 1)

    def _after_step(self, done: Done) -> None:
        """Log, evaluate and save what is due."""
        self._note_step(done)
        self._evaluate(done)
        done.reason = self.callbacks.agree_to_stop() if done.evaluated or done.ballots["callback"] else None
        done.improved = self._improved(done.values)
        self._write({**self.callbacks.take_logged(), **done.values})
        self._save_step(done)

    def _note_step(self, done: Done) -> None:
        recorder = self._recorder
        self.throughput.step(done.size)
        drawing = self._drawing()
        if recorder is not None:
            if recorder.seconds_to_first_step is None:
                with self.throughput.pause():
                    recorder.first_step(drawing)
            recorder.step(self.progress, self.throughput)
        self._call("on_step")
        if self._ended or done.ballots["log"] or self.log_every.due(self.progress):
            done.values.update(self._log())

    def _drawing(self) -> tuple[Any, Any] | None:
        """Return the traced network after the first step of a new run, for TensorBoard; every rank traces it."""
        batch, self.first_batch = self.first_batch, None  # its memory
        logging, network = self.job.logging, self.strategy.drawable()
        if batch is None or network is None or not (logging.tensorboard and logging.graph) or self._continues:
            return None
        with self.throughput.pause():
            return traced_step(network, batch, self.runtime.device)

    @property
    def _ended(self) -> bool:
        return self.progress.step == self.total_steps

    def _evaluate(self, done: Done) -> None:
        due = self._ended or done.ballots["evaluate"] or self.evaluate_every.due(self.progress)
        if self.evaluator is not None and due:
            self.strategy.merge_buffers()
            with self.throughput.pause(), self._pace.evaluation(), self.callbacks.evaluated(), self.strategy.resting():
                done.values.update(self.evaluator.run())
            done.evaluated = True
        self.progress.metrics.update(done.values)
        if done.evaluated:
            self.schedule.evaluated(self.progress.metrics)
            self._call("on_evaluate")

    def _save_step(self, done: Done) -> None:
        asked = any(done.ballots[wish] for wish in ("stop", "regroup", "checkpoint"))
        due = self._ended or bool(done.reason) or done.improved or self.save_every.due(self.progress)
        if due:
            # Not where a save was asked for: a run that was never stopped would not have merged them here.
            self.strategy.merge_buffers()
        if asked or due:
            with self.throughput.pause():
                self._save()

    def _write(self, values: dict[str, float]) -> None:
        if values and self._recorder is not None:
            self._recorder.log(self.progress, self.throughput, values)

    def _log(self) -> dict[str, float]:
        """Reduce the open sums over all workers and return the tags of the interval."""
        totals = self._finite_totals()
        self._check_replicas()
        self.sums.reset()
        values = {f"train/{name}": value for name, value in means(totals).items()}
        values["train/learning_rate"] = self._rate
        values["train/grad_norm"] = float(self.strategy.grad_norm())
        values.update(self.throughput.interval())
        taken = self.job.trainer.global_batch_size / max(values["throughput/samples_per_second"], 1e-9)
        if self.runtime.is_first:
            self._pace.look(taken, self.checkpointer.last, 0.0 if self.uploads is None else self.uploads.seconds)
        if self.advice is not None:
            values["throughput/predicted_ratio"] = self.advice.step.seconds / taken
        if self._share is not None:
            each = values["throughput/samples_per_second"] / self.runtime.world_size
            values["throughput/mfu"] = each * self._share
        values["memory/allocated_gib"] = hardware.allocated_gib(self.runtime.device)
        values["cluster/workers"] = float(self.runtime.world_size)
        values["cluster/restarts"] = float(self.progress.restarts)
        if self._recorder is not None:
            values.update(self._recorder.meter.tags())
        return values

    def _improved(self, values: dict[str, float]) -> bool:
        """Note the monitored tag's best value; tell whether this is it."""
        config = self.job.checkpoint
        value = values.get(config.monitor) if config.monitor else None
        if value is None or not math.isfinite(value):
            return False
        best = self.progress.best_value
        if best is not None and not (value < best if config.mode == "min" else value > best):
            return False
        self.progress.best_value, self.progress.best_step = value, self.progress.step
        return True

    def _finite_totals(self) -> dict[str, tuple[torch.Tensor, float]]:
        totals = self.sums.reduce(self.runtime)
        if not math.isfinite(float(totals["loss"][0])):
            self._fail_non_finite()
        return totals

    def _fail_non_finite(self) -> None:
        """Raise what says which rank met it at which step, on every rank alike."""
        error = self.finite.error(self.progress.step + 1, self._flags["bad"], self._flags["gradient"], self._kept())
        raise error or NonFiniteLoss(f"The loss became NaN or infinite at an unknown step; {self._kept()}.")

    def _require_finite_weights(self) -> None:
        """A gradient may be infinite though the loss is not. The next loss would tell, too late for this checkpoint."""
        if not self.strategy.is_finite():
            step = self.progress.step
            raise self.finite.error(step, False, False, self._kept()) or NonFiniteLoss(
                f"The weights became NaN or infinite by step {step}, while the loss was finite; {self._kept()}. Lower "
                "optimizer.lr, or look in training_step for a square root, a logarithm or a division at zero."
            )

    def _kept(self) -> str:
        newest = self._newest()
        return f"the last good checkpoint is {newest.path}" if newest.path else "there is no checkpoint yet"

    def _microbatches(self) -> Iterator[Any]:
        """Read this rank's microbatches of the present step once more."""
        self._close_batches()
        share = self.split.share(self.order.batch_size(self.progress.batch), self.runtime.rank, self.runtime.world_size)
        with closing(self._read_from_here()) as batches:
            yield from islice(batches, len(share))

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save unless this very step is saved already."""
        if self._saved_step == self.progress.step:
            return
        if self.runtime.device.type == "cuda":
            self._finite_totals()  # what is saved must be good; on the CPU each step has been looked at
        self._require_finite_weights()
        self.checkpointer.wait()  # `best` belongs to the next save, and the previous one still prunes by the old one
        self.checkpointer.best = self.progress.best_step
        self.checkpointer.save(self.progress.step, *self.state.collect())
        self._saved_step = self.progress.step

    def _leave_to_regroup(self) -> NoReturn:
        """End with everything saved; no rank goes before the checkpoint of all is there."""
        self.checkpointer.wait()
        self.runtime.barrier()
        raise Regroup(f"All workers have saved step {self.progress.step} and end, to be started again.")

    def _finish(self, status: str) -> dict[str, Any]:
        self.callbacks.call("on_end")
        self._write(self.callbacks.take_logged())
        saved = self.checkpointer.wait()
        self.checkpointer.close()
        if self._recorder is None:
            return {}
        return self._recorder.result(
            self.progress,
            self.throughput,
            status=status,
            reason=self._reason,
            checkpoint=saved.path if saved else self._newest_here().path,
        )
