"""From a section of the configuration to the object that the trainer works with."""

from __future__ import annotations

from collections.abc import Callable
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

# Chunks of a global batch in deterministic mode, when trainer.microbatch_size does not say otherwise: enough for eight
# workers to share the work, few enough that each still fills the kernels.
_CHUNKS = 8


def build_data(job: Job) -> Data:
    """Build the job's data sets.

    Raises:
        DataError: missing, empty or damaged data, in the data set's own words.
    """
    try:
        return Data.of(targets.build(job.data, "data", job.trust))
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def build_model(job: Job, runtime: Runtime) -> nn.Module:
    """Build the network on the device, from the seed alone.

    Raises:
        ConfigError: it has no `training_step`, or asks for what cannot be done, on this device or at all.
    """
    seed_everything(job.trainer.seed)
    model = construct(job.model, "model", job.trust)
    if not callable(getattr(model, "training_step", None)):
        raise ConfigError(
            f"model._target_={job.model['_target_']} has no training_step(batch); a model says there what its loss is, "
            "one value a sample (see docs/extending.md)."
        )
    rules_of(model)
    if job.trainer.sync_batchnorm:
        if runtime.device.type != "cuda":
            raise ConfigError(
                "trainer.sync_batchnorm=true needs GPUs (SyncBatchNorm refuses CPU tensors); leave it out."
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(runtime.device)
    return model.to(memory_format=torch.channels_last) if has_convolutions(model) else model


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def converter(model: nn.Module) -> Callable[[Any], Any]:
    """What every batch passes through before the model sees it."""
    return channels_last if has_convolutions(model) else (lambda batch: batch)


def build_split(job: Job) -> Split:
    """How global batches are cut; in deterministic mode by position alone."""
    trainer = job.trainer
    if not trainer.deterministic:
        return Split(trainer.microbatch_size)
    return Split(chunk=trainer.microbatch_size or max(1, -(-trainer.global_batch_size // _CHUNKS)))


def check_batch(job: Job, samples: int, workers: int) -> None:
    """Raise ConfigError where the batch arithmetic cannot be met by `samples` training samples and so many workers."""
    trainer = job.trainer
    share = -(-trainer.global_batch_size // workers)
    if trainer.microbatch_size is not None and trainer.microbatch_size > share:
        raise ConfigError(
            f"trainer.microbatch_size={trainer.microbatch_size} is larger than a worker's share of the global batch: "
            f"{trainer.global_batch_size} samples over {workers} worker(s) are {share}. Leave it out, or make it "
            "smaller."
        )
    if trainer.global_batch_size > samples:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} is larger than the training data, which has "
            f"{samples} "
            "samples. Use at most that."
        )


def build_loader(job: Job, data: Data, runtime: Runtime, model: nn.Module) -> Loader:
    """Build the reader of the training data."""
    fetch = Fetch(data.train, data.collate, job.trainer.seed, data.augment, "train")
    if callable(getattr(data.train, "stream", None)) and not job.trainer.overfit_batches:
        if job.trainer.deterministic:
            raise ConfigError(
                "trainer.deterministic=true was asked for with training data that are read as a stream, whose order "
                "depends on the workers. Read them sample by sample (data.stream=false), or leave deterministic mode."
            )
        return StreamLoader(data.train, runtime, job.trainer.seed, fetch=fetch, convert=converter(model))
    return Loader(fetch, runtime.device, data.num_workers, converter(model))


def build_order(job: Job, data: Data) -> Order:
    """Build the order of the training samples.

    Raises:
        ConfigError: `weights` of the data with an order that cannot follow them.
    """
    trainer, train = job.trainer, data.train
    streams = callable(getattr(train, "stream", None)) and not trainer.overfit_batches
    if data.weights is not None and not trainer.shuffle:
        raise ConfigError(
            "trainer.shuffle=false keeps the order of the data set, and the data have `weights`, by which samples are "
            "drawn at random. Leave one of them out."
        )
    if streams and (data.weights is not None or not trainer.shuffle):
        word = "trainer.shuffle=false" if data.weights is None else "`weights` of the data"
        raise ConfigError(
            f"The training data are read as a stream, which decides their order: {word} cannot be followed. Read them "
            "sample by sample (data.stream=false), or leave it out."
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
        ConfigError: deterministic mode with what it does not cover, or options that this place or model cannot have.
    """
    trainer, config = job.trainer, job.strategy
    if config.activation_checkpointing:
        recompute(model, config.blocks)
    if not trainer.deterministic:
        return kind_of(config, job.trust).build(model, runtime, trainer, config, build_split(job))
    if trainer.precision != "float32":
        raise ConfigError(
            f"trainer.deterministic=true was asked for with trainer.precision={trainer.precision}; its exact sums are "
            "made for float32. Use trainer.precision=float32, or leave deterministic mode."
        )
    chunk = build_split(job).chunk
    assert chunk is not None
    return ExactDataParallel(model, runtime, trainer, chunk)


def build_evaluator(job: Job, strategy: Strategy, runtime: Runtime, data: Data, tag: str) -> Evaluator | None:
    """Build the evaluator of the validation (`val`) or the test sets (`test`), or None where there are none."""
    sets = data.val if tag == "val" else data.test
    if not sets:
        return None
    convert = converter(strategy.model)
    evaluated = {}
    for name, dataset in sets.items():
        fetch = Fetch(dataset, data.collate, job.trainer.seed, name=f"{tag}/{name}".rstrip("/"))
        loader = Loader(fetch, runtime.device, data.num_workers, convert)
        evaluated[name] = Evaluated(loader, *evaluation_order(job, dataset, runtime.world_size))
    return Evaluator(strategy, runtime, evaluated, job.trainer.deterministic, tag)


def evaluation_order(job: Job, dataset: Any, workers: int) -> tuple[torch.Tensor, Split]:
    """Return the order in which a validation or test set is evaluated, and how it is divided among the workers."""
    split = build_split(job)
    if split.chunk is None and split.microbatch is None:
        # As many samples at once as training takes: what fits there, fits here.
        split = Split(microbatch=max(1, -(-job.trainer.global_batch_size // workers)))
    lengths = lengths_of(dataset)
    block = split.chunk or split.microbatch or 1
    # Shares of whole blocks, so that the samples of similar length stay together.
    own_split = split if lengths is None else Split(chunk=block)
    return order_of_evaluation(len(dataset), lengths, block), own_split


def caveats(model: nn.Module) -> list[str]:
    """Return what in the network makes its results depend on how a batch is split, one line each."""
    lines = []
    names = {type(module).__name__ for module in model.modules()}
    normalised = sorted(name for name in names if "BatchNorm" in name)
    if normalised:
        lines.append(
            f"The network has {', '.join(normalised)}: its statistics are those of a worker's microbatch, so results "
            "depend on the number of workers (trainer.sync_batchnorm=true shares them on GPUs; group normalisation has "
            "none)."
        )
    random_layers = sorted(
        {type(m).__name__ for m in model.modules() if "Dropout" in type(m).__name__ and getattr(m, "p", True)}
    )
    if random_layers:
        lines.append(
            f"The network has {', '.join(random_layers)}: random numbers are drawn by each worker, so results depend "
            "on the number of workers."
        )
    return lines
