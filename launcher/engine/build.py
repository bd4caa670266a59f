"""Builds the objects of a training run from the sections of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.config import Job, targets
from launcher.engine.batches import channels_last
from launcher.engine.buffers import rules_of
from launcher.engine.construct import construct
from launcher.engine.data import Loader
from launcher.engine.datasets import Data, blocks_of, lengths_of
from launcher.engine.evaluation import Evaluated, Evaluator
from launcher.engine.fetch import Fetch
from launcher.engine.order import Order, Split, order_of_evaluation
from launcher.engine.randomness import seed_everything
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.blocks import recompute
from launcher.engine.strategies.exact import ExactDataParallel
from launcher.engine.strategies.kinds.base import kind_of
from launcher.engine.strategies.strategy import Strategy
from launcher.engine.stream import StreamLoader
from launcher.errors import ConfigError, DataError

# Chunks of a global batch in deterministic mode without trainer.microbatch_size: enough for up to eight workers, and
# large enough for efficient kernels.
_CHUNKS = 8


def build_data(job: Job) -> Data:
    """Build the job's data sets.

    Raises:
        DataError: the data is missing, empty or damaged; has the message of the data set.
    """
    try:
        return Data.of(targets.build(job.data, "data", job.trust))
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def build_model(job: Job, runtime: Runtime) -> nn.Module:
    """Build the network on the device, initialised from `trainer.seed`.

    Raises:
        ConfigError: it has no `training_step`, or an option that the device does not support.
    """
    seed_everything(job.trainer.seed)
    model = construct(job.model, "model", job.trust)
    if not callable(getattr(model, "training_step", None)):
        raise ConfigError(
            f"model._target_={job.model['_target_']} has no method training_step(batch), which computes the loss, "
            "one value per sample. Add it (see docs/extending.md).",
            key="model._target_",
        )
    rules_of(model)
    if job.trainer.sync_batchnorm:
        if runtime.device.type != "cuda":
            raise ConfigError(
                "trainer.sync_batchnorm=true needs GPUs (SyncBatchNorm does not support CPU tensors). Leave it out.",
                key="trainer.sync_batchnorm",
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(runtime.device)
    return model.to(memory_format=torch.channels_last) if has_convolutions(model) else model


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def converter(model: nn.Module) -> Callable[[Any], Any]:
    """Return the function that converts every batch before it is passed to the model."""
    return channels_last if has_convolutions(model) else (lambda batch: batch)


def build_split(job: Job) -> Split:
    """Return how global batches are divided among workers; in deterministic mode by position only."""
    trainer = job.trainer
    if not trainer.deterministic:
        return Split(trainer.microbatch_size)
    return Split(chunk=trainer.microbatch_size or max(1, -(-trainer.global_batch_size // _CHUNKS)))


def check_batch(job: Job, samples: int, workers: int) -> None:
    """Raise ConfigError if the batch sizes do not fit the number of training samples and workers."""
    trainer = job.trainer
    share = -(-trainer.global_batch_size // workers)
    if trainer.microbatch_size is not None and trainer.microbatch_size > share:
        raise ConfigError(
            f"trainer.microbatch_size={trainer.microbatch_size} is larger than a worker's share of the global batch: "
            f"{trainer.global_batch_size} samples on {workers} worker(s) are {share} per worker. Leave it out, or "
            "reduce it.",
            key="trainer.microbatch_size",
        )
    if trainer.global_batch_size > samples:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} is larger than the training data, which has "
            f"{samples} samples. Reduce it to at most that number.",
            key="trainer.global_batch_size",
        )


def build_loader(job: Job, data: Data, runtime: Runtime, model: nn.Module) -> Loader:
    """Build the loader of the training data."""
    fetch = Fetch(data.train, data.collate, job.trainer.seed, data.augment, "train")
    if callable(getattr(data.train, "stream", None)) and not job.trainer.overfit_batches:
        if job.trainer.deterministic:
            raise ConfigError(
                "trainer.deterministic=true does not support training data that are read as a stream, because their "
                "order depends on the workers. Read them sample by sample (data.stream=false), or leave deterministic "
                "mode.",
                key="trainer.deterministic",
            )
        return StreamLoader(data.train, runtime, job.trainer.seed, fetch=fetch, convert=converter(model))
    return Loader(fetch, runtime.device, data.num_workers, converter(model))


def build_order(job: Job, data: Data) -> Order:
    """Build the order of the training samples.

    Raises:
        ConfigError: the data has `weights`, and the order of the job does not support them.
    """
    trainer, train = job.trainer, data.train
    streams = callable(getattr(train, "stream", None)) and not trainer.overfit_batches
    if data.weights is not None and not trainer.shuffle:
        raise ConfigError(
            "trainer.shuffle=false keeps the order of the data set, but the data has `weights`, by which samples are "
            "drawn at random. Remove one of the two.",
            key="trainer.shuffle",
        )
    if streams and (data.weights is not None or not trainer.shuffle):
        option = "trainer.shuffle=false" if data.weights is None else "`weights` of the data"
        raise ConfigError(
            f"The training data are read as a stream, which determines their order: {option} has no effect. Read them "
            "sample by sample (data.stream=false), or leave the option out."
        )
    return Order(
        len(train),
        trainer.global_batch_size,
        trainer.seed,
        trainer.overfit_batches,
        lengths_of(train),
        blocks_of(train),
        trainer.shuffle,
        trainer.drop_last,
        data.weights,
    )


def build_strategy(job: Job, model: nn.Module, runtime: Runtime) -> Strategy:
    """Build the strategy that the configuration names.

    Raises:
        ConfigError: the device or the model does not support an option, or deterministic mode does not.
    """
    trainer, config = job.trainer, job.strategy
    if config.activation_checkpointing:
        recompute(model, config.blocks)
    if not trainer.deterministic:
        return kind_of(config, job.trust).build(model, runtime, trainer, config, build_split(job))
    if trainer.precision != "float32":
        raise ConfigError(
            f"trainer.deterministic=true does not support trainer.precision={trainer.precision}; its exact sums need "
            "float32. Use trainer.precision=float32, or leave deterministic mode.",
            key="trainer.deterministic",
        )
    chunk = build_split(job).chunk
    assert chunk is not None
    return ExactDataParallel(model, runtime, trainer, chunk)


def build_evaluator(
    job: Job, strategy: Strategy, runtime: Runtime, data: Data, tag: str, folder: Path, required: str | None = None
) -> Evaluator | None:
    """Build the evaluator of the validation sets (tag `val`) or test sets (`test`); None if the data has none.

    Args:
        required: a tag that each evaluation must have, or None.
    """
    sets = data.val if tag == "val" else data.test
    if not sets:
        return None
    convert = converter(strategy.model)
    evaluated = {}
    for name, dataset in sets.items():
        fetch = Fetch(dataset, data.collate, job.trainer.seed, name=f"{tag}/{name}".rstrip("/"))
        loader = Loader(fetch, runtime.device, data.num_workers, convert)
        evaluated[name] = Evaluated(loader, *evaluation_order(job, dataset, runtime.world_size))
    return Evaluator(strategy, runtime, evaluated, job.trainer.deterministic, folder, tag, required)


def evaluation_order(job: Job, dataset: Any, workers: int) -> tuple[torch.Tensor, Split]:
    """Return the order in which a validation or test set is evaluated, and its division among the workers."""
    split = build_split(job)
    if split.chunk is None and split.microbatch is None:
        # As many samples at once as in training, so that they fit into the memory.
        split = Split(microbatch=max(1, -(-job.trainer.global_batch_size // workers)))
    lengths = lengths_of(dataset)
    block = split.chunk or split.microbatch or 1
    # Shares consist of whole blocks, so that samples of similar length stay together.
    own_split = split if lengths is None else Split(chunk=block)
    return order_of_evaluation(len(dataset), lengths, block), own_split


def caveats(model: nn.Module) -> list[str]:
    """Return a note for each part of the network that makes results depend on the number of workers."""
    lines = []
    names = {type(module).__name__ for module in model.modules()}
    normalised = sorted(name for name in names if "BatchNorm" in name)
    if normalised:
        lines.append(
            f"The network has {', '.join(normalised)}: its statistics are computed from one worker's microbatch, so "
            "results depend on the number of workers. On GPUs trainer.sync_batchnorm=true computes them over all "
            "workers; group normalisation does not depend on the batch."
        )
    random_layers = sorted(
        {type(m).__name__ for m in model.modules() if "Dropout" in type(m).__name__ and getattr(m, "p", True)}
    )
    if random_layers:
        lines.append(
            f"The network has {', '.join(random_layers)}: each worker draws its own random numbers, so results depend "
            "on the number of workers."
        )
    return lines
