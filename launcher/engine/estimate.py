"""What a job needs in samples, parameters and bytes, measured by building its data and its network.

The start check (`start_check.py`) is part of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.config import Job, targets
from launcher.engine.build import build_data, build_model, build_order, converter
from launcher.engine.callbacks import check_callbacks
from launcher.engine.datasets import Data
from launcher.engine.failures import translate
from launcher.engine.optimizer_check import try_optimizer, try_schedule
from launcher.engine.peaks import flops_per_sample
from launcher.engine.preserve import preserve_model
from launcher.engine.reading_check import notes_on_reading
from launcher.engine.runtime import Runtime
from launcher.engine.saved_tensors import SavedTensorBytes
from launcher.engine.sinks.base import chosen_sinks
from launcher.engine.start_check import (
    SAMPLES,
    StartCheck,
    check_monitor,
    without_sync_batchnorm,
)
from launcher.engine.strategies.blocks import blocks_of, recompute
from launcher.engine.strategies.compression import powersgd_bytes
from launcher.engine.strategies.kinds.base import DEFAULT, kind_of, option
from launcher.engine.strategies.strategy import DTYPES, casting
from launcher.engine.trials import BatchReader

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Ahead:
    """What is asked only for a device that is not here, in bytes; activations as in the precision of the job.

    Attributes:
        kept_per_sample, kept_once: what autograd keeps: with each sample, and however many there are (such as the
            weights in 16 bits).
        largest_per_sample: the largest piece of it, whose gradient is there when the backward pass begins.
        gathered: of weights that FSDP puts together: what it keeps together for a whole step, and the largest block.
        powersgd: of gradients that PowerSGD sends in a step.
        blocks: how many blocks FSDP would gather one by one.
        flops_per_sample: of the matrix products that were seen, three times those of the forward pass; None where there
            were none.
    """

    kept_per_sample: int
    kept_once: int
    largest_per_sample: int
    gathered: int
    powersgd: int
    blocks: int
    flops_per_sample: float | None


@dataclass(frozen=True)
class Estimate:
    """Sizes in samples, numbers of parameters, and bytes; activations are those that autograd keeps, for one sample."""

    train_samples: int
    val_samples: dict[str, int]
    test_samples: dict[str, int]
    parameters: int
    trained_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes_per_sample: int
    flops_per_sample: float | None
    tags: tuple[str, ...]
    notes: tuple[str, ...] = ()
    ahead: Ahead | None = None

    @property
    def resident_bytes(self) -> int:
        """Parameters, gradients and optimizer state of one worker."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def estimate(job: Job, ahead: bool = False, workers: int = 1, weights: str | None = None) -> Estimate:
    """Build data and network on the CPU and put a small batch through them.

    Args:
        ahead: find out what a device that is not here needs, too (`Estimate.ahead`): one more pass.
        workers: of the run.
        weights: the place of those that it begins with (`checkpoint.load`).

    Raises:
        RequestError: the configuration, the data or the model cannot be used; says which and why.
        UserCodeError: the model or the data set raised.
    """
    try:
        return _estimate(job, ahead, workers, weights)
    except Exception as error:
        translated = translate(error)
        if translated is error:
            translated.exit_status = 2  # a request that is refused; an exception of the user's own code is a failure
            raise
        raise translated from error


def _estimate(job: Job, ahead: bool, workers: int, weights: str | None) -> Estimate:
    for kind in ("optimizer", "scheduler"):
        section = getattr(job, kind)
        if section.get("_target_"):
            targets.check_signature(section, kind, job.trust)
    data = build_data(job)
    order = build_order(job, data)
    notes = notes_on_reading(data, job.trainer.seed)
    runtime = Runtime.single("cpu")
    cpu_job = job if not job.trainer.sync_batchnorm else without_sync_batchnorm(job)
    model = build_model(cpu_job, runtime)
    optimizer, of_optimizer = try_optimizer(job, model)
    total_steps = job.trainer.steps or job.trainer.epochs * order.steps_per_epoch
    try_schedule(job, optimizer, total_steps, order.steps_per_epoch, bool(data.val))
    kind_of(job.strategy, job.trust).check_model(model, job.strategy)
    counter = _flop_counter() if ahead else None
    if ahead and job.strategy.activation_checkpointing:
        recompute(model, job.strategy.blocks)
    check = StartCheck(job, model, data, workers)
    with counter or nullcontext(), _as_trained(job, runtime) if ahead else nullcontext():
        check.train()
    if weights is not None:
        check.load(weights)
    check.try_sizes()
    check.evaluate()
    tags = check.tags
    check_monitor(job, tags, data)
    check_callbacks(job, tags)
    chosen_sinks(job)  # raises where one does not exist
    trained = [p for p in model.parameters() if p.requires_grad]
    return Estimate(
        train_samples=len(data.train),
        val_samples={name: len(dataset) for name, dataset in data.val.items()},
        test_samples={name: len(dataset) for name, dataset in data.test.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        parameter_bytes=_bytes(model.parameters()),
        gradient_bytes=_bytes(trained),
        optimizer_bytes=of_optimizer,
        activation_bytes_per_sample=check.kept.total // SAMPLES,
        flops_per_sample=flops_per_sample(model),
        tags=tuple(tags),
        notes=(*notes, *check.notes),
        ahead=_ahead(job, model, data, runtime, check.kept, counter.get_total_flops()) if counter else None,
    )


def _flop_counter() -> FlopCounterMode:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ahead(job: Job, model: nn.Module, data: Data, runtime: Runtime, whole: SavedTensorBytes, flops: int) -> Ahead:
    """See `Ahead`. whole, flops: what the small batch kept, and what its forward pass cost."""
    one, once, largest = SavedTensorBytes(model), 0, whole.largest // SAMPLES
    batch = BatchReader(job, data, data.train, "train", converter(model))(0, 1)
    with (
        preserve_model(model),
        suppress(Exception),
        _as_trained(job, runtime),
        one.recording(),
    ):  # some layers refuse a batch of one
        model.training_step(batch)  # type: ignore[operator]
        once = max(0, 2 * one.total - whole.total)
        largest = max(0, whole.largest - one.largest)  # where both are the same, it does not grow with the samples
    strategy, trained = job.strategy, [p for p in model.parameters() if p.requires_grad]
    blocks = blocks_of(model, strategy.blocks)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    weights = sum(p.numel() for p in model.parameters())
    width = 4 if job.trainer.precision == "float32" else 2
    return Ahead(
        kept_per_sample=(whole.total - once) // SAMPLES,
        kept_once=once,
        largest_per_sample=largest,
        gathered=width * (weights - sum(inside) + max(inside, default=0)),
        powersgd=powersgd_bytes(trained, option(replace(strategy, name=DEFAULT), "powersgd_rank")),
        blocks=len(blocks),
        flops_per_sample=flops * 3 / SAMPLES or None,
    )


def _as_trained(job: Job, runtime: Runtime) -> AbstractContextManager[Any]:
    return casting(runtime.device, DTYPES[job.trainer.precision])
