"""A kind of strategy: its options, their checks, its costs, and how it is built. No torch.

A kind is one object in one file of this folder, which registers itself:

    @register
    class Name(StrategyKind): ...

Another package registers its class with an entry point of the group `launch.strategies`. No other module compares the
name of a strategy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config import Job, checks
from launcher.config.checks import one_of
from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import OVERLAP, Link, Step, predict
from launcher.engine.registry import Registry
from launcher.errors import ConfigError
from launcher.formatting import size

if TYPE_CHECKING:
    from torch import nn

    from launcher.engine.order import Split
    from launcher.engine.runtime import Runtime
    from launcher.engine.strategies.strategy import Strategy

COMPRESSIONS = ("none", "bf16", "fp16", "powersgd")
DEFAULT = StrategyConfig().name
_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "powerSGD": "powersgd", "off": "none"}
_COMMON = frozenset({"name", "compression", "activation_checkpointing", "blocks"})


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


class StrategyKind(ABC):
    """What is known of a strategy before it trains. The defaults are those of plain data parallelism."""

    name: ClassVar[str]
    position: ClassVar[int] = 100  # in lists of all strategies
    options: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {}
    )  # keys of the section `strategy` that only some have, with their defaults
    exact: ClassVar[bool] = True  # without compression, the losses are those of one worker, up to rounding
    divides: ClassVar[bool] = False  # each worker holds a part of the network
    diverges: ClassVar[bool] = False  # each worker has weights of its own
    takes_sparse: ClassVar[bool] = True  # gradients may be sparse
    deterministic: ClassVar[bool] = False  # may be trained with trainer.deterministic=true
    chooses: ClassVar[bool] = False  # another strategy is chosen in its place at the start
    plan_note: ClassVar[str] = ""  # behind the name in a plan
    # What its checkpoints hold, by default a form of its own: a run can change to a strategy with the same form. The
    # options on which the content depends must stay.
    checkpoint_form: ClassVar[str] = ""
    checkpoint_options: ClassVar[tuple[str, ...]] = ()

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        """Raise ConfigError where options have a value that they may not have."""
        if config.compression == "powersgd":
            raise ConfigError(
                f"strategy.compression=powersgd compresses the gradients of strategy={DEFAULT}, but the strategy is "
                f"{self.name}. Use strategy.compression=bf16 with {self.name}, or strategy={DEFAULT}."
            )

    def check_model(self, model: nn.Module, config: StrategyConfig) -> None:  # noqa: B027 (most take every network)
        """Raise ConfigError where the strategy cannot train this network."""

    @abstractmethod
    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        """Build the strategy over a network. What needs torch is imported here.

        Raises:
            ConfigError: this place or network cannot have what the options name.
        """

    # ---- costs ------------------------------------------------------------------------------------------------------

    def memory(self, config: StrategyConfig, workers: int, whole: Mapping[str, int]) -> dict[str, int]:
        """Return what one worker keeps of `whole`: bytes of `parameters`, `gradients` and `optimizer` of the network.

        Activations are not among them, nor is what FSDP puts together for a moment: the largest block.
        """
        return dict(whole)

    def memory_on_gpu(
        self, config: StrategyConfig, workers: int, machines: int, whole: Mapping[str, int]
    ) -> dict[str, int]:
        """Return what of `memory` is on the GPU of a worker, for workers on so many machines."""
        return self.memory(config, workers, whole)

    def traffic(
        self, config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, passes: int
    ) -> tuple[int, str]:
        """Return how many bytes of weights and gradients are exchanged in a step on the average, and that in words.

        It is the size of what is reduced or gathered; how much of it passes each link is the collective's business.
        """
        gradients = gradient_bytes // narrowing(config)
        return gradients, f"{size(gradients)} of gradients a step"

    def predicts(self, config: StrategyConfig) -> bool:
        """Whether `step` covers these options."""
        return True

    def advises(self, config: StrategyConfig) -> bool:
        """Whether `step` can be compared with a run from the network's size and the time of a pass alone."""
        return True

    def step(
        self, config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link
    ) -> Step:
        """Predict a step. compute: seconds that a worker computes in it; precision: `trainer.precision`."""
        # Gradients are reduced with the last microbatch alone: no other computing hides that.
        gradients = network.gradients / narrowing(config)
        return predict(compute, gradients, workers, link, overlap=OVERLAP / network.passes)


def narrowing(config: StrategyConfig) -> int:
    """Return how many times fewer bytes a number takes on its way."""
    return 2 if config.compression in ("bf16", "fp16") else 1


def label(config: StrategyConfig) -> str:
    """Return what a strategy is called beside others: its name, and its compression where it has one."""
    return config.name + (f", compression={config.compression}" if config.compression != "none" else "")


# ---- the registry ---------------------------------------------------------------------------------------------------

_KINDS: Registry[type[StrategyKind]] = Registry(
    "launcher.engine.strategies.kinds", "launch.strategies", "strategy.name"
)


def register(kind: type[StrategyKind]) -> type[StrategyKind]:
    """Register a kind of strategy under its name."""
    return _KINDS.register(kind.name)(kind)


def kinds() -> list[StrategyKind]:
    """Return the kinds of this process, in the order of the documentation."""
    return sorted((kind() for kind in _KINDS.all().values()), key=lambda kind: kind.position)


def kind_of(config: StrategyConfig, trust: list[str] | tuple[str, ...] = ()) -> StrategyKind:
    """Return the kind that a configuration names.

    Raises:
        ConfigError: there is none of this name.
        TrustError: it is of another package, which `trust` does not name.
    """
    return _KINDS.get(config.name, trust)()


def option(config: StrategyConfig, key: str) -> Any:
    """Return an option's value: what is set, or the strategy's default. KeyError where it has no such option."""
    value = getattr(config, key)
    return kind_of(config).options[key] if value is None else value


def identity(config: StrategyConfig) -> tuple[Any, ...]:
    """Return what must stay the same where a run is continued: what its checkpoints hold depends on it."""
    kind = kind_of(config)
    options = {key: value for key in kind.checkpoint_options if (value := getattr(config, key)) is not None}
    return kind.checkpoint_form or kind.name, config.compression, options


def check_strategy(job: Job) -> None:
    """Check the section `strategy`. Raises ConfigError with key, value and rule."""
    config, trainer = job.strategy, job.trainer
    kind = kind_of(config, job.trust)
    one_of("strategy.compression", config.compression, COMPRESSIONS, _ALIASES)
    for key in _options():
        if getattr(config, key) is not None and key not in kind.options:
            owners = " and ".join(other.name for other in kinds() if key in other.options)
            raise ConfigError(
                f"strategy.{key} is an option of strategy={owners}, but the strategy is {config.name}. Leave it out, "
                "or choose that strategy."
            )
    kind.check(config, trainer)
    if trainer.deterministic and (not kind.deterministic or config.compression != "none"):
        raise ConfigError(
            f"trainer.deterministic=true needs strategy={DEFAULT} and strategy.compression=none, whose sums do not "
            f"depend on the number of workers; found strategy={config.name} with compression {config.compression}. "
            "Choose those, or trainer.deterministic=false."
        )


def _options() -> list[str]:
    return [field.name for field in fields(StrategyConfig) if field.name not in _COMMON]


checks.add_check(check_strategy)
