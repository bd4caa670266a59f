"""What a strategy keeps on a worker, and what of the network travels, in bytes. No torch."""

from __future__ import annotations

from launcher.phrases import size
from launcher.schema import StrategyConfig, TrainerConfig


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
