"""What a strategy keeps on a worker, what of the network travels, in bytes, and how long a step takes. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import OVERLAP, Link, Step, predict, predict_rare, predict_sharded
from launcher.formatting import size


def memory(config: StrategyConfig, workers: int, whole: dict[str, int]) -> dict[str, int]:
    """Return what one worker keeps of `whole`: bytes of `parameters`, `gradients` and `optimizer` of the network.

    Activations are not among them, nor is what FSDP puts together for a moment: the largest block.
    """
    if config.name == "fsdp":
        # The first dimension of each tensor is divided and rounded up.
        return {name: -(-part // workers) for name, part in whole.items()}
    if config.name in ("local_sgd", "diloco"):
        has_momentum = config.name == "diloco" and config.option("outer_momentum") > 0
        return {**whole, "outer": whole["gradients"] * (2 if has_momentum else 1)}
    if config.compression == "powersgd":
        return {**whole, "left out": whole["gradients"]}  # at most: of the matrices that are compressed
    return dict(whole)


def traffic(
    config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, microbatches: int
) -> tuple[int, str]:
    """Return how many bytes of weights and gradients are exchanged in a step on the average, and that in words.

    It is the size of what is reduced or gathered; how much of it passes each link is the collective's business.
    """
    narrow = 2 if config.compression in ("bf16", "fp16") else 1
    gradients = gradient_bytes // narrow
    if config.name in ("local_sgd", "diloco"):
        every = config.option("inner_steps")
        return gradients // every, f"{size(gradients)} of differences every {every} steps"
    if config.name == "fsdp":
        weights = parameter_bytes // (1 if trainer.precision == "float32" else 2)
        each = 2 * weights + gradients
        times = f"{microbatches} microbatches" if microbatches > 1 else "one microbatch"
        return each * microbatches, f"{size(each * microbatches)} of weights and gradients a step ({times})"
    if config.compression == "powersgd":
        rank = config.option("powersgd_rank")
        return gradients, f"gradients as matrices of rank {rank} (whole they are {size(gradients)}) a step"
    return gradients, f"{size(gradients)} of gradients a step"


def label(config: StrategyConfig) -> str:
    """Return what a strategy is called beside others: its name, and its compression where it has one."""
    return config.name + (f", compression={config.compression}" if config.compression != "none" else "")


@dataclass(frozen=True)
class Network:
    """What of a network travels.

    Attributes:
        weights, gradients: bytes, as they are kept.
        powersgd: bytes of gradients with `strategy.compression=powersgd`.
        blocks: how many FSDP gathers one by one.
        passes: microbatches in a worker's step.
    """

    weights: float
    gradients: float
    powersgd: float = 0.0
    blocks: int = 0
    passes: int = 1


def step(config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link) -> Step:
    """Predict a step with a strategy. compute: seconds that a worker computes in it; precision: `trainer.precision`."""
    gradients = network.gradients / (2 if config.compression in ("bf16", "fp16") else 1)
    if config.name in ("local_sgd", "diloco"):
        return predict_rare(compute, gradients, workers, link, config.option("inner_steps"))
    if config.name == "fsdp":
        weights = network.weights / (1 if precision == "float32" else 2)
        return predict_sharded(
            compute,
            network.passes * weights,
            network.passes * gradients,
            workers,
            link,
            messages=network.passes * (network.blocks + 1),
        )
    if config.compression == "powersgd":  # it begins when the backward pass is done
        return predict(compute, network.powersgd, workers, link, overlap=0.0)
    # Gradients are reduced with the last microbatch alone: no other computing hides that.
    return predict(compute, gradients, workers, link, overlap=OVERLAP / network.passes)
