"""The typed schema of the configuration. Plain Python: no Hydra, no torch. `checks.py` validates the values.

`launcher.config` composes the dataclass `Job` from `conf/`; all other code receives a `Job`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from datetime import datetime
from functools import cache
from typing import Any, get_type_hints

from launcher.config import cluster_kinds
from launcher.errors import ConfigError

# Sections whose keys are arguments of a class; they are checked against its signature.
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
    sinks: list[str] = field(default_factory=list)  # that are not on by default, by name
    profile: list[int] | None = None  # [first step, last step] of a trace


@dataclass
class StrategyConfig:
    """Options that only some strategies have are None by default: each strategy has its own default."""

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


@dataclass
class ClusterConfig:
    """The keys that all kinds of clusters have. Each kind has a subclass with its own (`launcher.clusters`).

    On the command line and in files all keys stand side by side in the section `cluster`.
    """

    kind: str = field(default_factory=lambda: str(cluster_kinds.one_with("is_default").name))
    name: str | None = None  # of a cluster that `launch up` makes; default: its kind
    size: str | None = None  # of the GPU VMs, one of `launch sizes`
    nodes: int = 1  # GPU VMs
    min_nodes: int | None = None  # VMs that `launch up` waits for, default all; others are added when a job needs them
    head_size: str = "Standard_D4s_v5"  # of the small VM beside them
    region: str = "eastus"
    spot: Any = False  # true, false or "prefer"
    idle_minutes: float = 10.0  # after which a GPU VM without work is deleted
    node_usd_per_hour: float | None = None  # price of a machine with workers; default: by size, region and spot
    head_usd_per_hour: float | None = None  # price of a head without workers; needs node_usd_per_hour
    budget_usd: float | None = None  # that the run may cost over its whole life
    mounts: dict[str, Any] = field(default_factory=dict)  # path on every node -> abfss://… (read-only) or claim://NAME
    setup: list[str] = field(default_factory=list)  # shell lines for every node, before a run
    env: list[str] = field(default_factory=list)  # names of environment variables that are passed to the workers
    detach: bool = False  # do not wait for a remote run

    @property
    def of_kind(self) -> Any:
        """Return the registered kind (`launcher.clusters.base.ClusterKind`); the default for an unknown name."""
        return cluster_kinds.find(self.kind) or cluster_kinds.one_with("is_default")

    def changed_to(self, kind: cluster_kinds.KeysOfKind, **changes: Any) -> ClusterConfig:
        """Return the configuration for another kind: common keys stay, keys of this kind are dropped."""
        return cluster_section({**asdict(self), "kind": kind.name, **changes})


def own_keys(kind: cluster_kinds.KeysOfKind) -> tuple[str, ...]:
    """Return the names of the keys that a kind adds to the common ones."""
    common = {each.name for each in fields(ClusterConfig)}
    return tuple(each.name for each in fields(kind.config) if each.name not in common)


def cluster_section(tree: Mapping[str, Any]) -> ClusterConfig:
    """Return the section `cluster` as the dataclass of its kind. Keys of other kinds are dropped.

    Raises:
        ConfigError: a key belongs to no registered kind.
    """
    kinds = cluster_kinds.all_kinds()
    kind = kinds.get(tree["kind"]) if "kind" in tree else cluster_kinds.one_with("is_default")
    make = ClusterConfig if kind is None else kind.config
    known = {each.name for each in fields(make)}
    foreign = {key for other in kinds.values() for key in own_keys(other)}
    if unknown := [key for key in tree if key not in known | foreign]:
        raise ConfigError(
            f"cluster.{unknown[0]} is no key of any cluster kind: {', '.join(kinds)}.", key=f"cluster.{unknown[0]}"
        )
    found: ClusterConfig = make(**{key: value for key, value in tree.items() if key in known})
    return found


def foreign_keys(tree: Mapping[str, Any]) -> dict[str, bool]:
    """Return the keys of a section `cluster` that its own kind does not have, each with whether a value is set."""
    kinds = cluster_kinds.all_kinds()
    chosen = kinds.get(tree["kind"])
    own = {each.name for each in fields(ClusterConfig if chosen is None else chosen.config)}
    default = cluster_schema()()
    others = {key for kind in kinds.values() for key in own_keys(kind)} - own
    return {key: tree[key] != getattr(default, key) for key in tree if key in others}


@cache
def cluster_schema() -> type[ClusterConfig]:
    """Return a dataclass with the keys of all kinds side by side, as files and the command line have them."""
    common = {each.name for each in fields(ClusterConfig)}
    more: dict[str, tuple[str, Any, Any]] = {}
    for kind in cluster_kinds.all_kinds().values():
        hints = get_type_hints(kind.config)
        for each in fields(kind.config):
            if each.name in common:
                continue
            copy = field(default=each.default, default_factory=each.default_factory)
            if each.name in more and more[each.name][1] != hints[each.name]:
                raise TypeError(f"Two cluster kinds have a key cluster.{each.name}, of different types.")
            more.setdefault(each.name, (each.name, hints[each.name], copy))
    return make_dataclass("AllClusterConfig", [*more.values()], bases=(ClusterConfig,))


@dataclass
class SweepConfig:
    sampler: Any = "grid"  # a name, or a mapping with the `_target_` of a class and its options
    sampler_options: dict[str, Any] = field(default_factory=dict)
    trials: int | None = None
    seed: int = 0
    metric: Any = None  # a tag, or a list of tags; None: checkpoint.monitor
    direction: Any = None  # min or max, or a list of them; None: checkpoint.mode
    pruner: Any = "none"  # as `sampler`
    pruner_options: dict[str, Any] = field(default_factory=dict)
    min_evaluations: int = 1
    reduction: int = 3
    keep: str = "all"
    fail_fast: bool = False
    exit: str = "all_failed"
    over: Any = None  # a swept key, or a list of them, whose values repeat a trial
    warm_start: str | None = None
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
    cluster: ClusterConfig = field(default_factory=lambda: cluster_section({}))
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
    if name == "cluster":
        return cluster_section(value)
    make = next(item.default_factory for item in fields(Job) if item.name == name)
    kind = type(make()) if callable(make) else None
    return kind(**value) if kind is not None and is_dataclass(kind) else value


@cache
def job_schema() -> type[Job]:
    """Return `Job` with the keys of all cluster kinds in the section `cluster`: what Hydra composes."""
    section = cluster_schema()
    return make_dataclass("JobSchema", [("cluster", section, field(default_factory=section))], bases=(Job,))


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
        "above zero.",
        key=key,
    )


def default_run_name(choices: Mapping[str, Any], now: datetime) -> str:
    """Return `<experiment>-YYYYmmdd-HHMMSS`, the name of a run that was given none."""
    experiment = choices.get("experiment") or "run"
    names = experiment if isinstance(experiment, (list, tuple)) else [experiment]
    word = "-".join(re.sub(r"[^A-Za-z0-9_-]+", "-", str(name)) for name in names)
    return f"{word}-{now:%Y%m%d-%H%M%S}"
