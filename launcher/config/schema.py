"""The typed schema of the configuration. Plain Python: no Hydra, no torch. What its values may be is in `checks.py`.

Everything beyond the entry point is handed the dataclass `Job`; `launcher.config` composes one from `conf/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any

from launcher.errors import ConfigError

RENTED = ("existing", "ssh", "azure", "kuberay")  # of these, whose machines may be paid by the hour
# Sections that are as open as the class that they name; their keys are checked against its signature.
OPEN_SECTIONS = ("model", "data", "optimizer", "scheduler", "callbacks", "vars")


@dataclass
class RunConfig:
    name: str | None = None
    root: str = "runs"
    resume: Any = False  # true, false or "auto"
    like: str | None = None


@dataclass
class TrainerConfig:
    epochs: int = 1
    steps: int | None = None
    global_batch_size: int = 64
    microbatch_size: int | None = None
    precision: str = "float32"
    deterministic: bool = False
    compile: bool = False
    compile_blocks: bool = False
    clip_norm: float | None = None
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    sync_batchnorm: bool = False
    overfit_batches: int = 0
    log_every: Any = 50
    evaluate_every: Any = "1ep"


@dataclass
class ScalingConfig:
    workers: Any = "auto"
    device: str = "auto"
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    min_workers: int | None = None
    timeout: float = 120.0


@dataclass
class CheckpointConfig:
    every: Any = "1ep"
    keep: int = 1
    max_failures: int = 3
    monitor: str | None = "val/loss"
    mode: str = "min"
    load: str | None = None
    load_strict: bool = True


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    graph: bool = True
    hparams: Any = field(default_factory=list)  # a list of keys; a sweep hands its trials a mapping key -> value
    profile: list[int] | None = None  # [first step, last step] of a trace


@dataclass
class StrategyConfig:
    """`None` stands for the strategy's own default, see `STRATEGY_OPTIONS`."""

    name: str = "ddp"
    compression: str = "none"
    activation_checkpointing: bool = False
    blocks: list[str] = field(default_factory=list)
    static_graph: bool | None = None
    bucket_mb: float | None = None
    powersgd_rank: int | None = None
    powersgd_after: int | None = None
    cpu_offload: bool | None = None
    hybrid: bool | None = None
    inner_steps: int | None = None
    overlap_steps: int | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None

    def option(self, key: str) -> Any:
        """Return an option's value: what is set, or this strategy's default. KeyError where it has no such option."""
        default = STRATEGY_OPTIONS[key][self.name]
        value = getattr(self, key)
        return default if value is None else value


# Option -> the strategies that have it, with their defaults. The paper of DiLoCo has an outer momentum of 0.9, for
# hundreds of meetings; over tens of them it overshoots (docs/log.md).
STRATEGY_OPTIONS: dict[str, dict[str, Any]] = {
    "static_graph": {"ddp": False},
    "bucket_mb": {"ddp": 25.0},
    "powersgd_rank": {"ddp": 4},
    "powersgd_after": {"ddp": 10},
    "cpu_offload": {"fsdp": False},
    "hybrid": {"fsdp": False},
    "inner_steps": {"local_sgd": 8, "diloco": 20},
    "overlap_steps": {"local_sgd": 0, "diloco": 0},
    "outer_lr": {"diloco": 0.7},
    "outer_momentum": {"diloco": 0.3},
}


@dataclass
class ClusterConfig:
    kind: str = "local"
    keep_minutes: float = 0.0  # how long the embedded Ray stays for the next command
    address: str | None = None  # HOST:PORT of an existing cluster; default: RAY_ADDRESS
    name: str | None = None  # of a cluster that `launch up` makes; default: its kind
    hosts: list[str] = field(default_factory=list)  # [USER@]HOST[:PORT] each, the head first
    user: str | None = None  # on hosts that are written without one
    ssh_key: str | None = None  # file of the private key; default: what ssh would take
    ssh_config: str | None = None  # in place of ~/.ssh/config
    python: str | None = None  # interpreter of an environment that the hosts have already
    size: str | None = None  # of the GPU VMs, one of `launch sizes`
    nodes: int = 1  # GPU VMs
    head_size: str = "Standard_D4s_v5"  # of the small VM beside them
    region: str = "eastus"
    zone: str | None = None  # of the region, one for all VMs; default: the first that has the size
    spot: Any = False  # true, false or "prefer"
    min_nodes: int | None = None  # GPU VMs that `up` waits for, default all; the others come when a job asks for them
    # Of {size, region, zone, …}: tried in their order where Azure has none.
    alternatives: list[Any] = field(default_factory=list)
    idle_minutes: float = 10.0  # after which a GPU VM without work is deleted
    down_after: bool = False  # remove all, the head too, after idle_minutes without work
    launch_attempts: int = 3  # failed launches of GPU VMs after which no further one is tried
    subscription: str | None = None  # of Azure; default: that of `az account show`
    ssh_from: str | None = None  # the address (CIDR) that may reach the head, or `anywhere`; default: this machine's
    node_usd_per_hour: float | None = None  # what a machine with workers costs; default: by size, region and spot
    head_usd_per_hour: float | None = None  # and one beside them that only leads; needs node_usd_per_hour
    budget_usd: float | None = None  # that the run may cost over its whole life
    mounts: dict[str, Any] = field(default_factory=dict)  # path on every node -> abfss://… (read-only) or claim://NAME
    image: str | None = None  # of head and workers in pods
    context: str | None = None  # of kubectl; default: the current one
    namespace: str = "default"  # of Kubernetes
    secret: str | None = None  # of Kubernetes, whose keys are what `env` names
    service_account: str | None = None  # of the pods, with a workload identity that may reach storage
    setup: list[str] = field(default_factory=list)  # shell lines for every node, before a run
    env: list[str] = field(default_factory=list)  # names of variables that the workers get from here
    detach: bool = False  # do not wait for a run elsewhere


@dataclass
class SweepConfig:
    sampler: str = "grid"
    trials: int | None = None
    seed: int = 0
    metric: Any = None  # a tag, or a list of tags; None: checkpoint.monitor
    direction: Any = None  # min or max, or a list of them; None: checkpoint.mode
    pruner: str = "none"
    min_evaluations: int = 1
    reduction: int = 3
    keep: str = "all"
    fail_fast: bool = False
    concurrency: int | None = None


@dataclass
class Job:
    """One training job, complete and plain: what travels to the workers.

    `model`, `data`, `optimizer` and `scheduler` are open mappings with a `_target_`, `callbacks` is one of names to
    such; `launcher.config.targets` builds them.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    vars: dict[str, Any] = field(default_factory=dict)
    trust: list[str] = field(default_factory=list)
    verbose: bool = False

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Job:
        """Return the job whose sections are the entries of `tree`, as plain data."""
        return cls(**{item.name: section(item.name, tree[item.name]) for item in fields(cls)})


def section(name: str, value: Any) -> Any:
    """Return one section of a job, given as plain data: its dataclass, or the value itself where it has none."""
    make = next(item.default_factory for item in fields(Job) if item.name == name)
    kind = type(make()) if callable(make) else None
    return kind(**value) if kind is not None and is_dataclass(kind) else value


@dataclass(frozen=True)
class Interval:
    """How often something happens. Exactly one of the three is set."""

    steps: int | None = None  # optimizer steps
    epochs: int | None = None
    seconds: float | None = None


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_interval(value: Any, key: str) -> Interval:
    """Read `50` (steps), `1ep` (epochs), `30s`, `10min` or `2h` (time).

    Raises ConfigError that names `key` for anything else, zero and negative numbers included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return Interval(steps=value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|ep|s|min|h)\s*", value)
        if match and float(match[1]) > 0:
            number, unit = match[1], match[2]
            if unit in _SECONDS:
                return Interval(seconds=float(number) * _SECONDS[unit])
            if "." not in number:
                return Interval(epochs=int(number)) if unit else Interval(steps=int(number))
    raise ConfigError(
        f"{key} is {value!r}, but must be a number of steps (50), of epochs (1ep) or a time (30s, 10min, 2h), "
        "above zero."
    )


def default_run_name(choices: Mapping[str, Any], now: datetime) -> str:
    """Return `<experiment>-YYYYmmdd-HHMMSS`, the name of a run that was given none."""
    experiment = choices.get("experiment") or "run"
    names = experiment if isinstance(experiment, (list, tuple)) else [experiment]
    word = "-".join(re.sub(r"[^A-Za-z0-9_-]+", "-", str(name)) for name in names)
    return f"{word}-{now:%Y%m%d-%H%M%S}"
