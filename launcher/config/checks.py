"""Validates the values of a configuration beyond their types: one error per rule, with key, value and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.config.cluster_kinds import all_kinds
from launcher.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Job,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    SweepConfig,
    TrainerConfig,
    cluster_section,
    foreign_keys,
    own_keys,
    parse_interval,
)
from launcher.errors import ConfigError, did_you_mean

PRECISIONS = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
MODES = ("min", "max")
KEEP = ("all", "best")
EXIT_RULES = ("all_failed", "any_failed")
MOST_TRACED = 100  # steps; some MB each


def check_run_name(name: str, key: str = "run.name") -> None:
    """Raise ConfigError unless `name` can be a directory directly under the run root."""
    bad = (
        not name.strip()
        or name != name.strip()
        or name.startswith(".")
        or ".." in name
        or "/" in name
        or "\\" in name
        or not name.isprintable()
        or len(name.encode()) > 200
    )
    if bad:
        raise ConfigError(
            f"{key} is {name!r}, but must be a plain directory name: not empty, at most 200 bytes, without /, \\, "
            "two dots in a row, a dot in front, spaces around it, or control characters.",
            key=key,
        )


def check_values(job: Job) -> None:
    """Check every value that the schema's types alone cannot. Raises ConfigError with key, value and rule."""
    check_run(job.run)
    _check_trainer(job.trainer)
    _check_scaling(job.scaling)
    _check_checkpoint(job.checkpoint)
    _check_cluster(job.cluster)
    _check_logging(job.logging)
    _check_sweep(job.sweep)
    _check_classes(job)
    for check in _FURTHER:
        check(job)


_FURTHER: list[Callable[[Job], None]] = []


def add_check(check: Callable[[Job], None]) -> None:
    """Register a check of a package that this one does not import, such as strategies, for `check_values`."""
    _FURTHER.append(check)


def _check_scaling(scaling: ScalingConfig) -> None:
    workers = scaling.workers
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ConfigError(
            f"scaling.workers is {workers!r}, but must be a whole number of at least 1, or auto.", key="scaling.workers"
        )
    one_of("scaling.device", scaling.device, DEVICES)
    above_zero("scaling.cpus_per_worker", scaling.cpus_per_worker)
    if scaling.gpus_per_worker is not None:
        at_least("scaling.gpus_per_worker", scaling.gpus_per_worker, 0)
    _check_elastic(scaling)


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    parse_interval(checkpoint.every, "checkpoint.every")
    at_least("checkpoint.keep", checkpoint.keep, 1)
    at_least("checkpoint.max_failures", checkpoint.max_failures, 0)
    one_of("checkpoint.mode", checkpoint.mode, MODES)


def _check_logging(logging: LoggingConfig) -> None:
    keys = logging.hparams
    if not isinstance(keys, (list, dict)) or not all(isinstance(key, str) for key in keys):
        raise ConfigError(
            f"logging.hparams is {keys!r}, but must be a list of keys, such as [optimizer.lr].", key="logging.hparams"
        )
    _check_profile(logging.profile)


def _check_classes(job: Job) -> None:
    """Raise ConfigError if an open section names no class, or the learning rate is invalid."""
    for section in ("model", "data", "optimizer"):
        if "_target_" not in getattr(job, section):
            raise ConfigError(
                f"{section} names no class: choose one of the group, {section}=NAME, or give a mapping with "
                "`_target_`.",
                key=section,
            )
    for name, section in job.callbacks.items():
        if section is not None and not (isinstance(section, dict) and "_target_" in section):
            raise ConfigError(
                f"callbacks.{name} names no class: choose one of the group, callbacks=[ema], or give a mapping with "
                "`_target_`.",
                key=f"callbacks.{name}",
            )
    rate = job.optimizer.get("lr", 0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ConfigError(
            f"optimizer.lr is {'null' if rate is None else repr(rate)}, but must be a number of at least 0. Leave it "
            "out for the default of the class.",
            key="optimizer.lr",
        )


def _check_elastic(scaling: ScalingConfig) -> None:
    above_zero("scaling.timeout", scaling.timeout)
    fewest, workers = scaling.min_workers, scaling.workers
    if fewest is None:
        return
    at_least("scaling.min_workers", fewest, 1)
    if workers == "auto":
        raise ConfigError(
            f"scaling.min_workers={fewest} is the minimum number of workers, and also needs the maximum: "
            "add scaling.workers=NUMBER.",
            key="scaling.min_workers",
        )
    if fewest > workers:
        raise ConfigError(
            f"scaling.min_workers={fewest} is more than scaling.workers={workers}. Lower it.", key="scaling.min_workers"
        )


def check_run(run: RunConfig) -> None:
    """Check the section `run`. Raises ConfigError with key, value and rule."""
    if run.name is not None:
        check_run_name(run.name)
    if not run.root.strip():
        raise ConfigError(
            "run.root is empty, but must be the directory (or the URI) under which runs are written.", key="run.root"
        )
    if run.resume not in (True, False, "auto") or isinstance(run.resume, (int, float)) is not isinstance(
        run.resume, bool
    ):
        raise ConfigError(f"run.resume is {run.resume!r}, but must be true, false or auto.", key="run.resume")
    if run.resume is not False and run.name is None:
        raise ConfigError(
            f"run.resume={str(run.resume).lower()} needs the name of the run that is to be continued: "
            "add run.name=NAME (`launch runs` lists them).",
            key="run.resume",
        )
    if run.resume is not False and run.like is not None:
        raise ConfigError(
            "run.resume continues a run, run.like starts a new one from another's configuration: give one of the two.",
            key="run.resume",
        )


def _check_sweep(sweep: SweepConfig) -> None:
    for key, value in (("sweep.sampler", sweep.sampler), ("sweep.pruner", sweep.pruner)):  # names: launcher.sweeps
        if not isinstance(value, str) and not (isinstance(value, dict) and "_target_" in value):
            raise ConfigError(f"{key} is {value!r}, but must be a name, or a mapping with the `_target_` of a class.")
    one_of("sweep.keep", sweep.keep, KEEP)
    one_of("sweep.exit", sweep.exit, EXIT_RULES)
    over = [sweep.over] if isinstance(sweep.over, str) else [] if sweep.over is None else sweep.over
    if not isinstance(over, list) or not all(isinstance(key, str) for key in over):
        raise ConfigError(
            f"sweep.over is {sweep.over!r}, but must be a swept key, or a list of swept keys.", key="sweep.over"
        )
    at_least("sweep.min_evaluations", sweep.min_evaluations, 1)
    at_least("sweep.reduction", sweep.reduction, 2)
    for name in ("trials", "concurrency"):
        value = getattr(sweep, name)
        if value is not None:
            at_least(f"sweep.{name}", value, 1)
    for direction in sweep.direction if isinstance(sweep.direction, list) else [sweep.direction]:
        if direction is not None:
            one_of("sweep.direction", direction, MODES)


def _check_cluster(cluster: ClusterConfig) -> None:
    one_of("cluster.kind", cluster.kind, [*all_kinds()])
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # Without the text itself: a NAME=VALUE here contains a secret, which must not be recorded.
            raise ConfigError(
                "cluster.env lists names of environment variables, such as [HF_TOKEN], and one of its entries is none. "
                "Export the variable and write its name alone; the value is read from the environment.",
                key="cluster.env",
            )
    at_least("cluster.nodes", cluster.nodes, 1)
    at_least("cluster.min_nodes", cluster.min_nodes or 0, 0)
    above_zero("cluster.idle_minutes", cluster.idle_minutes)
    cluster.of_kind.check(cluster)
    if not (isinstance(cluster.spot, bool) or cluster.spot == "prefer"):
        raise ConfigError(f"cluster.spot is {cluster.spot!r}, but must be true, false or prefer.", key="cluster.spot")
    if not re.fullmatch(r"[a-z]+[a-z0-9]*", cluster.region):
        raise ConfigError(
            f"cluster.region is {cluster.region!r}, but must be the name of an Azure region, small letters and digits, "
            "such as eastus.",
            key="cluster.region",
        )
    if cluster.budget_usd is not None:
        above_zero("cluster.budget_usd", cluster.budget_usd)
    _check_rates(cluster)
    _check_mounts(cluster)
    # A user's configuration may contain cluster.region and cluster.head_size although they have no effect yet.
    if cluster.size is None:
        sized = (("spot", False),) if cluster.of_kind.counts_own_nodes else (("nodes", 1), ("spot", False))
        for key, default in sized:
            if (value := getattr(cluster, key)) != default:
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(
                    f"cluster.{key}={shown} needs cluster.size=SIZE, the size of the VMs (`launch sizes` lists them): "
                    "add it, or leave the key out.",
                    key=f"cluster.{key}",
                )


def check_foreign_keys(tree: Mapping[str, Any]) -> None:
    """Check the keys of a section `cluster` that belong to other kinds than its own.

    Raises:
        ConfigError: a key has no meaning with this kind, or its value breaks the rule of its own kind.
    """
    foreign = foreign_keys(tree)
    for kind in all_kinds().values():
        given = [key for key in own_keys(kind) if foreign.get(key)]
        for key in given:
            if key in kind.exclusive_keys:
                raise ConfigError(
                    f"cluster.{key} belongs to cluster={kind.name}, but the cluster is {tree['kind']}. Leave it out.",
                    key=f"cluster.{key}",
                )
        if given:
            kind.check(cluster_section({**tree, "kind": kind.name}))


def _check_mounts(cluster: ClusterConfig) -> None:
    if cluster.mounts and not cluster.of_kind.makes_mounts:
        names = [kind.name for kind in all_kinds().values() if kind.makes_mounts]
        raise ConfigError(
            f"cluster.mounts makes directories of the nodes of cluster={' and '.join(names)}, but the cluster is "
            f"{cluster.kind}. Leave it out; what is mounted there already is read by its path.",
            key="cluster.mounts",
        )


def _check_rates(cluster: ClusterConfig) -> None:
    for key in ("node_usd_per_hour", "head_usd_per_hour"):
        if (value := getattr(cluster, key)) is not None:
            at_least(f"cluster.{key}", value, 0)
    if cluster.head_usd_per_hour and cluster.node_usd_per_hour is None:
        raise ConfigError(
            f"cluster.head_usd_per_hour={cluster.head_usd_per_hour:g} is the price of the head alone: "
            "add cluster.node_usd_per_hour=USD, the price of each node.",
            key="cluster.head_usd_per_hour",
        )
    if cluster.budget_usd is not None and cluster.size is None and cluster.node_usd_per_hour is None:
        raise ConfigError(
            f"cluster.budget_usd={cluster.budget_usd:g} needs to know what the machines cost: add cluster.size=SIZE "
            "(`launch sizes` lists them) or cluster.node_usd_per_hour=USD, or leave the budget out.",
            key="cluster.budget_usd",
        )


def _check_profile(steps: list[int] | None) -> None:
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] or steps[1] - steps[0] >= MOST_TRACED:
        raise ConfigError(
            f"logging.profile is {steps}, but must be the first and the last step of the trace, such as [10,15]: steps "
            f"count from 1, and a trace of more than {MOST_TRACED} is too large for any viewer.",
            key="logging.profile",
        )


def _check_trainer(trainer: TrainerConfig) -> None:
    for name in ("epochs", "steps", "global_batch_size", "microbatch_size"):
        value = getattr(trainer, name)
        if value is not None:
            at_least(f"trainer.{name}", value, 1)
    one_of("trainer.precision", trainer.precision, PRECISIONS)
    if trainer.deterministic and trainer.precision != "float32":
        raise ConfigError(
            f"trainer.deterministic=true needs trainer.precision=float32, but the precision is {trainer.precision}.",
            key="trainer.deterministic",
        )
    if trainer.clip_norm is not None:
        above_zero("trainer.clip_norm", trainer.clip_norm)
    if not 0 <= trainer.seed < 2**63:
        raise ConfigError(f"trainer.seed is {trainer.seed}, but must lie between 0 and 2**63 - 1.", key="trainer.seed")
    at_least("trainer.overfit_batches", trainer.overfit_batches, 0)
    parse_interval(trainer.log_every, "trainer.log_every")
    parse_interval(trainer.evaluate_every, "trainer.evaluate_every")


def at_least(key: str, value: float, least: int) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{key} is {value}, but must be at least {least}.", key=key)


def above_zero(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{key} is {value}, but must be a number above zero.", key=key)


# What other tools call them.
_USUAL = {
    "minimize": "min",
    "maximize": "max",
    "gpu": "cuda",
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}


def one_of(key: str, value: str, known: Sequence[str], usual: Mapping[str, str] = _USUAL) -> None:
    if value not in known:
        hint = did_you_mean(usual.get(value, value), known)
        raise ConfigError(f"{key} is {value!r}, but must be one of {', '.join(known)}.{hint}", key=key)
