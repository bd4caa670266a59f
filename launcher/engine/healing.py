"""Training that goes on when a worker is lost (`scaling.heal`): the others redo the step, a new one joins them.

A step counts when its last collective (the sums of the metrics) has succeeded; what follows is each worker's own work.
So one that is lost in the middle leaves the others at the same step, or one step apart. They say how far they have come
when they meet anew (`engine.membership`), and who is behind takes everything from one who has come farthest: tensors
as bytes and the rest as JSON, in the form of a checkpoint. A worker that is new is one who is behind.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from launcher.engine.control import Watch
from launcher.engine.failures import translate
from launcher.engine.membership import Generation
from launcher.engine.metrics import SharedSums
from launcher.engine.progress import Done
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.stream import StreamLoader
from launcher.engine.trainer import SETTLE_SECONDS, Trainer
from launcher.errors import CheckpointError, ConfigError, WorkerLost

PARTS = 5  # of what follows a step, see `Trainer._after_step`
WRITTEN = 4  # so many of them are done once the step's values are written


class _Finished(Exception):
    """The run ended in order while this worker was starting."""


class HealingTrainer(Trainer):
    """A `Trainer` whose worker belongs to `runtime.membership`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        runtime: Runtime = args[1]
        self._membership = runtime.membership
        self._new = self._membership.begun  # has nothing that the others lack
        self._done: Done | None = None
        self._learned = False  # `_done` came from another worker, and this one has not seen it yet
        self._norm: tuple[int, float] | None = None
        self._resave = False
        super().__init__(*args, **options)
        if isinstance(self.loader, StreamLoader):
            raise ConfigError(
                "scaling.heal=true was asked for with training data that are read as a stream, where nobody can "
                "read again what a lost worker had. Read them sample by sample (data.stream=false), or leave "
                "scaling.heal out."
            )

    def _make_sums(self) -> SharedSums:
        self.shared = SharedSums(self.runtime, self.job.trainer.deterministic)
        return self.shared

    def _open_checkpoints(self) -> None:
        if not self._new:  # who waits to be let in must not tidy up what others are writing
            super()._open_checkpoints()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end; see `Trainer.fit`. Who comes when the run has ended returns at once."""
        watch = Watch(self.directory)
        try:
            with watch:
                if self._new:
                    self._regroup(redoes=False)
                else:
                    self._begin()
                return self._loop_and_settle(watch)
        except _Finished:
            return {}
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def _begin(self) -> None:
        resumed_at = self._resume()
        if self.runtime.is_first:
            self._record_from(resumed_at)

    def _step(self, watch: Watch) -> Done:
        if self._done is not None and self._done.ballots["admit"]:
            with suppress(CheckpointError):
                self.checkpointer.wait()
            self._regroup(redoes=False)
        before = self.progress.step
        buffers = [buffer.clone() for buffer in self.strategy.model.buffers()]
        while True:
            if self._learned and self._done is not None:
                self._learned = False
                return self._done
            self._learned = False
            try:
                return super()._step(watch)
            except Exception as error:
                if not is_lost(error):
                    raise
            # Outside of the handler: the traceback holds the broken groups.
            assert self.progress.step == before
            with torch.no_grad():
                for buffer, kept in zip(self.strategy.model.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
            self._regroup(redoes=True)
            buffers = [buffer.clone() for buffer in self.strategy.model.buffers()]
            before = self.progress.step

    def _wishes(self, watch: Watch) -> dict[str, bool]:
        wishes = super()._wishes(watch)
        wishes["checkpoint"] |= self._resave
        return {**wishes, "admit": self._membership.waiting}

    def _commit(self, size: int, vote: Vote) -> Done:
        self.shared.share()  # the last collective of the step: from here on it counts
        self._done = super()._commit(size, vote)
        return self._done

    def _after_step(self, done: Done) -> None:
        while True:
            try:
                super()._after_step(done)
                return
            except Exception as error:
                if not is_lost(error):
                    raise
            self._regroup(redoes=False)
            self._learned = False
            assert self._done is not None
            if done is not self._done:  # what another worker knows of the same step, for the caller to see
                vars(done).update(vars(self._done))
                self._done = done

    def _save(self) -> None:
        super()._save()
        self._resave = False

    def _log(self) -> dict[str, float]:
        values = super()._log()
        if self._norm is not None and self._norm[0] == self.progress.step:
            values["train/grad_norm"] = self._norm[1]  # another worker has applied this gradient
        return values

    def _finish(self, status: str) -> dict[str, Any]:
        while True:
            if self._done is not None:
                self._after_step(self._done)
            try:
                if self._resave:
                    self._saved_step = None
                    self._save()
                self.checkpointer.wait()
                break
            except Exception as error:
                if not is_lost(error):
                    raise
            self._regroup(redoes=False)
        result = super()._finish(status)
        if self.runtime.is_first:
            self._membership.finish()
        return result

    # ---- healing ----------------------------------------------------------------------------------------------------

    def _regroup(self, redoes: bool) -> None:
        """Go on with the workers that there are now, from the state of those that have come farthest."""
        while True:
            try:
                generation = self._join(redoes)
                redoes = False
                self._level(generation)
                break
            except Exception as error:
                if not is_lost(error):
                    raise
        if self._done is not None:
            self._done.ballots["admit"] = 0
        self._take_part()

    def _join(self, redoes: bool) -> Generation:
        self._close_batches()
        self.shared.undo()
        self.runtime.leave_groups()
        if hasattr(self, "checkpointer"):
            self._resave |= self.checkpointer.abandon(SETTLE_SECONDS)
        position = None if self._new else (self.progress.step, PARTS if self._done is None else self._done.parts)
        generation = self._membership.regroup(self.runtime, position, redoes)
        if generation is None:
            raise _Finished
        return generation

    def _level(self, generation: Generation) -> None:
        """Bring all to the same state, and count."""
        source, rank = generation.source, self.runtime.rank
        if source is None:
            self._new = False
            super()._open_checkpoints()
            self._saved_step = None
            self._begin()
        else:
            group = self.runtime.host_group
            if rank == source:
                for other in generation.behind:
                    send(self._everything(), other, group)
            elif rank in generation.behind:
                self._new = True  # half of it is worse than nothing
                self._take(source, group)
                self._new = False
                self._learned = True
            super()._open_checkpoints()
            self.progress.restarts += generation.lost
            self.progress.lost_steps += int(generation.members[source].redoes)
            self.progress.joined(self.runtime.world_size)
            self.state.seed_rank()
        self.strategy.regroup()

    def _everything(self) -> dict[str, Any]:
        shared, _ = self.state.collect()
        return {
            **{name: part for name, part in shared.items() if name != "weights"},
            "sums": self.shared.whole(),
            "done": None if self._done is None else asdict(self._done),
            "norm": [self.progress.step, float(self.strategy.grad_norm())],
            "saved": self._saved_step,
        }

    def _take(self, source: int, group: dist.ProcessGroup) -> None:
        given = receive(source, group, self.state.places())
        self.state.take(given)
        self.shared.take_whole(given["sums"])
        self._done = None if given["done"] is None else Done(**given["done"])
        self._norm = (given["norm"][0], given["norm"][1])
        self._saved_step = given["saved"]

    def _take_part(self) -> None:
        """Keep the run's record where this is rank 0 now, and let go of it elsewhere."""
        if not self.runtime.is_first:
            if self._recorder is not None:
                self._recorder.close()
                self._recorder = None
            return
        written = self._done is None or self._done.parts >= WRITTEN
        if self._recorder is None:
            self._record_from(self.progress.step - (not written), taken_over=True)
        if written and self._done is not None and self._recorder and self._recorder.logged < self.progress.step:
            self._write(self._done.values)

    def _loop(self, watch: Watch) -> dict[str, Any]:
        # Whoever becomes rank 0 shall not make the others wait for TensorBoard's import.
        if self.job.logging.tensorboard and not self.runtime.is_first:
            threading.Thread(target=_import_tensorboard, name="launch-imports", daemon=True).start()
        return super()._loop(watch)


def _import_tensorboard() -> None:
    import torch.utils.tensorboard  # noqa: F401


def is_lost(error: BaseException | None) -> bool:
    """Whether an exception says that another worker has gone; a failed checkpoint, whether that is why."""
    if error is None:
        return False
    if isinstance(error, (WorkerLost, dist.DistError)):
        return True
    if isinstance(error, CheckpointError) or hasattr(error, "failures"):
        failures = getattr(error, "failures", None) or {}
        return is_lost(error.__cause__) or any(is_lost(cause) for cause, _ in failures.values())
    return isinstance(error, Exception) and isinstance(translate(error), WorkerLost)


# ---- state from worker to worker ------------------------------------------------------------------------------------


def send(nest: dict[str, Any], to: int, group: dist.ProcessGroup) -> None:
    """Send a nest, as checkpoints hold them, to rank `to`: JSON that names its tensors, then their bytes."""
    from launcher.engine.checkpoint.nest import Encoder
    from launcher.engine.checkpoint.reader import DTYPE_NAMES

    encoder = Encoder()
    skeleton = encoder.encode(nest, "state")
    table = [[name, DTYPE_NAMES[one.dtype], list(one.shape)] for name, one in encoder.tensors.items()]
    head = torch.frombuffer(bytearray(json.dumps({"nest": skeleton, "tensors": table}).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([head.numel()]), to, group=group)
    dist.send(head, to, group=group)
    for tensor in encoder.tensors.values():
        if tensor.numel():
            dist.send(_bytes(tensor), to, group=group)


def receive(source: int, group: dist.ProcessGroup, into: dict[str, Any]) -> dict[str, Any]:
    """Return the nest that rank `source` sends; tensors go into those of `into`, see `checkpoint.nest.Binder`."""
    from launcher.engine.checkpoint.nest import Binder, Mismatch, TensorInfo, decode
    from launcher.engine.checkpoint.reader import DTYPE_NAMES

    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source, group=group)
    head = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(head, source, group=group)
    told = json.loads(head.numpy().tobytes())
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    infos = {name: TensorInfo(name, dtypes[dtype], tuple(shape)) for name, dtype, shape in told["tensors"]}
    binder = Binder()
    nest = binder.bind(decode(told["nest"], infos), into)
    if binder.missing or binder.unexpected or binder.differing:
        raise Mismatch("of another worker", binder.missing, binder.unexpected, binder.differing)
    for name, tensor in _received(infos, source, group):
        for info, place in binder.reads:
            if info.name == name:
                place.detach().copy_(tensor)
    return nest


def _received(infos: dict[str, Any], source: int, group: dist.ProcessGroup) -> Iterator[tuple[str, torch.Tensor]]:
    for name, info in infos.items():
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if tensor.numel():
            dist.recv(_bytes(tensor), source, group=group)
            yield name, tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, uint8 (N,): a view where it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
