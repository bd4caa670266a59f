"""The kind `slurm`: submits a run or sweep to Slurm as a batch job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.clusters.base import ClusterKind, Machines, WaitingRun
from launcher.config.checks import at_least
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.clusters.slurm.script import SlurmJob
    from launcher.runs import RunDirectory


@dataclass
class SlurmCluster(ClusterConfig):
    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None  # in a format of sbatch, such as 12:00:00; default: that of the partition
    gres: str | None = None  # of each node, such as gpu:4
    constraint: str | None = None  # features of the nodes
    cpus: int | None = None  # of each node; default: whole nodes
    requeue: bool = False  # queue the job again before its time limit
    notice_seconds: int = 120  # before the time limit
    sbatch_options: list[str] = field(default_factory=list)  # further options, such as --mem=64G


SHORTEST_SECONDS = 60
_SINGLE = ("partition", "account", "qos", "gres", "constraint")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and days-hours:minutes:seconds
_TIME = re.compile(r"(?:(\d{1,4})-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?|(?:(\d{1,5}):)??(\d{1,7})(?::(\d{1,2}))?)")


def seconds_of(text: str) -> int | None:
    """Return a time limit of sbatch in seconds; None if it is none."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, day_hours, day_minutes, day_seconds, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + day_hours + hours) * 60 + day_minutes + minutes) * 60 + day_seconds + seconds


class Slurm(ClusterKind):
    name = "slurm"
    config = SlurmCluster
    is_batch = True
    shares_files = True
    counts_own_nodes = True
    key_help = {  # noqa: RUF012
        "partition": "Slurm partition; null: the default one.",
        "account": "Slurm account that is charged; null: the user's default.",
        "qos": "Slurm quality of service; null: the default one.",
        "time_limit": "Time limit of the Slurm job, as sbatch reads it (12:00:00); null: that of the partition.",
        "gres": "Generic resources of each Slurm node, such as gpu:4.",
        "constraint": "Features that each Slurm node must have.",
        "cpus": "CPUs on each Slurm node, which other jobs may share; null: whole nodes.",
        "requeue": "true: a Slurm job that reaches its time limit is queued again and continues its run.",
        "notice_seconds": "Seconds before the Slurm time limit at which a run saves a checkpoint and stops.",
        "sbatch_options": "Further options of sbatch, such as [--mem=64G,--exclude=node7].",
    }

    def check(self, cluster: SlurmCluster) -> None:
        for key in _SINGLE:
            value = getattr(cluster, key)
            if value is not None and (not re.fullmatch(r"[^\s'\"\\#]+", value) or value.startswith("-")):
                raise ConfigError(f"cluster.{key} is {value!r}, but must be one word without quotes.")
        for option in cluster.sbatch_options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n'\"\\]+)?", option):
                raise ConfigError(
                    f"cluster.sbatch_options contains {option!r}, but must list long options of sbatch, such as "
                    "[--mem=64G]."
                )
        if cluster.cpus is not None:
            at_least("cluster.cpus", cluster.cpus, 1)
        at_least("cluster.notice_seconds", cluster.notice_seconds, 1)
        if cluster.time_limit is not None:
            self._check_time(cluster.time_limit)

    def _check_time(self, limit: str) -> None:
        seconds = seconds_of(limit)
        if seconds is None:
            raise ConfigError(
                f"cluster.time_limit is {limit!r}, but must be a time as sbatch reads it: MINUTES, "
                "HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, such as 12:00:00."
            )
        if seconds < SHORTEST_SECONDS:
            raise ConfigError(
                f"cluster.time_limit={limit} is less than a minute, which Slurm cannot enforce, and in which no run "
                "starts. Use a longer limit, such as cluster.time_limit=01:00:00."
            )

    def machines(self, cluster: ClusterConfig) -> Machines:
        raise ConfigError(
            "cluster=slurm is set in a configuration file, but this command starts the workers itself. Set it on the "
            "command line to submit a batch job: launch … cluster=slurm."
        )

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> SlurmJob:
        from launcher.clusters.slurm.script import slurm_job

        assert isinstance(cluster, SlurmCluster)
        return slurm_job(cluster, run, root, words)

    def waiting(self, run: RunDirectory) -> WaitingRun | None:
        from launcher.clusters.slurm.submission import waiting

        return waiting(run)


KIND = Slurm()
