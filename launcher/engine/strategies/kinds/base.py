"""The base class of strategy kinds: options, checks, costs and construction of a strategy. No torch.

A kind is a class in its own file of this folder, which registers itself:

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
    """Facts about a network that determine the communication of a step.

    Attributes:
        weights, gradients: bytes in memory.
        powersgd: bytes of gradients with `strategy.compression=powersgd`.
        blocks: number of blocks that FSDP gathers separately.
        passes: number of microbatches in a worker's step.
    """

    weights: float
    gradients: float
    powersgd: float = 0.0
    blocks: int = 0
    passes: int = 1


class StrategyKind(ABC):
    """The options, checks and costs of a strategy. The defaults are those of plain data parallelism.

    Attributes:
        name: value of `strategy.name`.
        position: sort key in lists of all strategies.
        options: keys of the section `strategy` that not all strategies have, with their defaults.
        exact: without compression, the losses are those of one worker, up to rounding.
        divides: each worker holds a shard of the network.
        diverges: the weights of the workers differ between synchronizations.
        takes_sparse: gradients may be sparse.
        deterministic: supports trainer.deterministic=true.
        chooses: another strategy is chosen in its place at the start of the run.
        plan_note: text after the name in a plan.
        checkpoint_form: format of its checkpoints, by default its name. A run can resume with any strategy of the same
            format.
        checkpoint_options: options that must not change on resume, because the content of checkpoints depends on them.
    """

    name: ClassVar[str]
    position: ClassVar[int] = 100
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    exact: ClassVar[bool] = True
    divides: ClassVar[bool] = False
    diverges: ClassVar[bool] = False
    takes_sparse: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    plan_note: ClassVar[str] = ""
    checkpoint_form: ClassVar[str] = ""
    checkpoint_options: ClassVar[tuple[str, ...]] = ()

    def check(self, config: StrategyConfig, trainer: TrainerConfig) -> None:
        """Raise ConfigError if an option has an invalid value."""
        if config.compression == "powersgd":
            raise ConfigError(
                f"strategy.compression=powersgd compresses the gradients of strategy={DEFAULT}, but the strategy is "
                f"{self.name}. Use strategy.compression=bf16 with {self.name}, or strategy={DEFAULT}.",
                key="strategy.compression",
            )

    def check_model(self, model: nn.Module, config: StrategyConfig) -> None:  # noqa: B027 (most train every network)
        """Raise ConfigError if the strategy cannot train this network."""

    @abstractmethod
    def build(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> Strategy:
        """Build the strategy for a network. Implementations import torch only in this method.

        Raises:
            ConfigError: the workers or the network do not support an option.
        """

    # ---- costs ------------------------------------------------------------------------------------------------------

    def memory(self, config: StrategyConfig, workers: int, whole: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of `parameters`, `gradients` and `optimizer` on one worker.

        Activations are not included, nor is the largest block, which FSDP gathers temporarily.

        Args:
            whole: the same bytes of the whole network.
        """
        return dict(whole)

    def memory_on_gpu(
        self, config: StrategyConfig, workers: int, machines: int, whole: Mapping[str, int]
    ) -> dict[str, int]:
        """Return the part of `memory` that is on the GPU of a worker, for `workers` on `machines`."""
        return self.memory(config, workers, whole)

    def traffic(
        self, config: StrategyConfig, trainer: TrainerConfig, parameter_bytes: int, gradient_bytes: int, passes: int
    ) -> tuple[int, str]:
        """Return the average bytes of weights and gradients that a step exchanges, and a description.

        This is the size of the reduced and gathered tensors; the collective determines how many bytes use each link.
        """
        gradients = gradient_bytes // narrowing(config)
        return gradients, f"{size(gradients)} of gradients a step"

    def predicts(self, config: StrategyConfig) -> bool:
        """Return whether `step` supports these options."""
        return True

    def advises(self, config: StrategyConfig) -> bool:
        """Return whether the network's size and the time of a pass are sufficient to compare `step` with a run."""
        return True

    def step(
        self, config: StrategyConfig, precision: str, network: Network, compute: float, workers: int, link: Link
    ) -> Step:
        """Predict the time of a step.

        Args:
            precision: `trainer.precision`.
            compute: seconds for which a worker computes.
        """
        # Gradients are reduced during the last microbatch only, so other microbatches do not overlap with it.
        gradients = network.gradients / narrowing(config)
        return predict(compute, gradients, workers, link, overlap=OVERLAP / network.passes)


def narrowing(config: StrategyConfig) -> int:
    """Return the factor by which `strategy.compression` reduces the bytes of a gradient value."""
    return 2 if config.compression in ("bf16", "fp16") else 1


def label(config: StrategyConfig) -> str:
    """Return the display name of a strategy: its name, with its compression if it has one."""
    return config.name + (f", compression={config.compression}" if config.compression != "none" else "")


# ---- the registry ---------------------------------------------------------------------------------------------------

_KINDS: Registry[type[StrategyKind]] = Registry(
    "launcher.engine.strategies.kinds", "launch.strategies", "strategy.name"
)


def register(kind: type[StrategyKind]) -> type[StrategyKind]:
    """Class decorator that registers a kind of strategy under its name."""
    return _KINDS.register(kind.name)(kind)


def kinds() -> list[StrategyKind]:
    """Return all registered kinds, in the order of the documentation."""
    return sorted((kind() for kind in _KINDS.all().values()), key=lambda kind: kind.position)


def kind_of(config: StrategyConfig, trust: list[str] | tuple[str, ...] = ()) -> StrategyKind:
    """Return the kind for a configuration.

    Raises:
        ConfigError: no kind of this name is registered.
        TrustError: the kind belongs to another package, which `trust` does not name.
    """
    return _KINDS.get(config.name, trust)()


def option(config: StrategyConfig, key: str) -> Any:
    """Return the value of an option, or the strategy's default if it is not set.

    Raises:
        KeyError: the strategy has no such option.
    """
    value = getattr(config, key)
    return kind_of(config).options[key] if value is None else value


def accepted_options(config: StrategyConfig, trust: list[str] | tuple[str, ...] = ()) -> frozenset[str]:
    """Return the keys of the section `strategy` that the configured strategy accepts."""
    return _COMMON | kind_of(config, trust).options.keys()


def identity(config: StrategyConfig) -> tuple[Any, ...]:
    """Return the facts that must not change on resume, because the content of checkpoints depends on them."""
    kind = kind_of(config)
    options = {key: value for key in kind.checkpoint_options if (value := getattr(config, key)) is not None}
    return kind.checkpoint_form or kind.name, config.compression, options


def check_strategy(job: Job) -> None:
    """Check the section `strategy`.

    Raises:
        ConfigError: a value is invalid; the message names key, value and rule.
    """
    config, trainer = job.strategy, job.trainer
    kind = kind_of(config, job.trust)
    one_of("strategy.compression", config.compression, COMPRESSIONS, _ALIASES)
    for key in _options():
        if getattr(config, key) is not None and key not in kind.options:
            owners = " and ".join(other.name for other in kinds() if key in other.options)
            raise ConfigError(
                f"strategy.{key} is an option of strategy={owners}, but the strategy is {config.name}. Remove the "
                "option, or choose that strategy.",
                key=f"strategy.{key}",
            )
    kind.check(config, trainer)
    if trainer.deterministic and (not kind.deterministic or config.compression != "none"):
        raise ConfigError(
            f"trainer.deterministic=true needs strategy={DEFAULT} and strategy.compression=none, whose sums do not "
            f"depend on the number of workers; found strategy={config.name} with compression {config.compression}. "
            "Change the strategy, or set trainer.deterministic=false.",
            key="trainer.deterministic",
        )


def _options() -> list[str]:
    return [field.name for field in fields(StrategyConfig) if field.name not in _COMMON]


checks.add_check(check_strategy)
