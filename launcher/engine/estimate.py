"""Measures the number of samples, parameters and bytes of a job by building its data and its network.

The start check (`start_check.py`) is part of the estimate.
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
from launcher.engine.steps import StepInfo, call_training_step
from launcher.engine.strategies.blocks import blocks_of, recompute
from launcher.engine.strategies.compression import powersgd_bytes
from launcher.engine.strategies.kinds.base import DEFAULT, kind_of, option
from launcher.engine.strategies.strategy import DTYPES, casting
from launcher.engine.trials import BatchReader

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class DeviceSizes:
    """Sizes for a prediction on another device, in bytes; activations in the precision of the job.

    Attributes:
        saved_per_sample, saved_once: tensors that autograd saves for each sample, and independently of the batch size
            (such as weights cast to 16 bits).
        largest_per_sample: the largest saved tensor, whose gradient exists at the start of the backward pass.
        gathered: weights that FSDP gathers at the same time: those outside of blocks, and the largest block.
        powersgd: gradients that PowerSGD sends in a step.
        blocks: the number of blocks that FSDP gathers one by one.
        flops_per_sample: FLOPs of the matrix products, three times those of the forward pass, or None if there are
            none.
    """

    saved_per_sample: int
    saved_once: int
    largest_per_sample: int
    gathered: int
    powersgd: int
    blocks: int
    flops_per_sample: float | None


@dataclass(frozen=True)
class Estimate:
    """The numbers of samples and parameters, and the sizes in bytes; activations are the tensors that autograd "
    "saves."""

    train_samples: int
    val_samples: dict[str, int]
    test_samples: dict[str, int]
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes_per_sample: int
    flops_per_sample: float | None
    tags: tuple[str, ...]
    notes: tuple[str, ...] = ()
    device_sizes: DeviceSizes | None = None


def estimate(job: Job, device_sizes: bool = False, workers: int = 1, weights: str | None = None) -> Estimate:
    """Build the data and the network on the CPU, and pass a small batch through the network.

    Args:
        device_sizes: also measure the sizes for another device (`Estimate.device_sizes`), which takes one more pass.
        workers: number of workers of the run.
        weights: path or URI of the weights that the run starts from (`checkpoint.load`).

    Raises:
        RequestError: the configuration, the data or the model cannot be used; states the reason.
        UserCodeError: the model or the data set raised an exception.
    """
    try:
        return _estimate(job, device_sizes, workers, weights)
    except Exception as error:
        translated = translate(error)
        if translated is error:
            translated.exit_status = 2  # a rejected request; an exception of the user's code is a failure instead
            raise
        raise translated from error


def _estimate(job: Job, device_sizes: bool, workers: int, weights: str | None) -> Estimate:
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
    optimizer, optimizer_state_bytes = try_optimizer(job, model)
    total_steps = job.trainer.steps or job.trainer.epochs * order.steps_per_epoch
    try_schedule(job, optimizer, total_steps, order.steps_per_epoch, bool(data.val))
    kind_of(job.strategy, job.trust).check_model(model, job.strategy)
    counter = _flop_counter() if device_sizes else None
    if device_sizes and job.strategy.activation_checkpointing:
        recompute(model, job.strategy.blocks)
    check = StartCheck(job, model, data, workers, total_steps)
    with counter or nullcontext(), _as_trained(job, runtime) if device_sizes else nullcontext():
        check.train()
    if weights is not None:
        check.load(weights)
    check.try_sizes()
    check.evaluate()
    tags = check.tags
    if check.knows_all_tags:
        check_monitor(job, tags, data)
    check_callbacks(job, tags if check.knows_all_tags else None)
    chosen_sinks(job)  # raises if a sink does not exist
    trained = [p for p in model.parameters() if p.requires_grad]
    return Estimate(
        train_samples=len(data.train),
        val_samples={name: len(dataset) for name, dataset in data.val.items()},
        test_samples={name: len(dataset) for name, dataset in data.test.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        parameter_bytes=sum(p.nbytes for p in model.parameters()),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=optimizer_state_bytes,
        activation_bytes_per_sample=check.saved.total // SAMPLES,
        flops_per_sample=flops_per_sample(model),
        tags=tuple(tags),
        notes=(*notes, *check.notes),
        device_sizes=_device_sizes(job, model, data, runtime, check.saved, counter.get_total_flops())
        if counter
        else None,
    )


def _flop_counter() -> FlopCounterMode:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _device_sizes(
    job: Job, model: nn.Module, data: Data, runtime: Runtime, whole: SavedTensorBytes, flops: int
) -> DeviceSizes:
    """Return the sizes for another device.

    Args:
        whole: the tensors that autograd saved for the small batch.
        flops: of the forward pass of the small batch.
    """
    one, once, largest = SavedTensorBytes(model), 0, whole.largest // SAMPLES
    batch = BatchReader(job, data, data.train, "train", converter(model))(0, 1)
    with (
        preserve_model(model),
        suppress(Exception),
        _as_trained(job, runtime),
        one.recording(),
    ):  # some layers reject a batch of one sample
        call_training_step(model, batch, StepInfo())
        once = max(0, 2 * one.total - whole.total)
        largest = max(0, whole.largest - one.largest)  # 0 if it does not grow with the number of samples
    strategy, trained = job.strategy, [p for p in model.parameters() if p.requires_grad]
    blocks = blocks_of(model, strategy.blocks)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    weights = sum(p.numel() for p in model.parameters())
    width = 4 if job.trainer.precision == "float32" else 2
    return DeviceSizes(
        saved_per_sample=(whole.total - once) // SAMPLES,
        saved_once=once,
        largest_per_sample=largest,
        gathered=width * (weights - sum(inside) + max(inside, default=0)),
        powersgd=powersgd_bytes(trained, option(replace(strategy, name=DEFAULT), "powersgd_rank")),
        blocks=len(blocks),
        flops_per_sample=flops * 3 / SAMPLES or None,
    )


def _as_trained(job: Job, runtime: Runtime) -> AbstractContextManager[Any]:
    return casting(runtime.device, DTYPES[job.trainer.precision])
