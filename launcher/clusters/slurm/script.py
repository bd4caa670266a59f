"""A run as a batch job of Slurm, and its batch script. Calls no program of Slurm before `submit`.

The job has one task per node. The first task starts the head of a Ray cluster and then the driver of the run, the
others join (`node`). Ray's own `ray symmetric-run` is not used: it refuses a host on which another Ray runs, stops all
Rays of the user at its end, gives the nodes 30 s to start, and passes no signal to the driver.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.clusters.pricing.rates import overrides as rate_overrides
from launcher.clusters.slurm.kind import SlurmCluster, seconds_of
from launcher.errors import ConfigError
from launcher.runs import RunDirectory, user_state
from launcher.runs.storage import is_gathered

OUTPUT = "output.txt"
EXIT = "exit"  # a file with the exit status of the run, or REQUEUE
REQUEUE = "requeue"


@dataclass(frozen=True)
class SlurmJob:
    """The request to run a job on Slurm.

    Attributes:
        run, root: run.name and run.root.
        cluster: the configuration of the cluster.
        command: the arguments of the command of the driver.
        calling: the working directory of the job.
        folder: the directory for the files of the job.
        python: the interpreter that runs launch on every node.
    """

    run: str
    root: str
    cluster: SlurmCluster
    command: tuple[str, ...]
    calling: Path
    folder: Path
    python: str

    @property
    def directory(self) -> str:
        """Return the run directory, a path or a URI."""
        return f"{self.root.rstrip('/')}/{self.run}"

    def options(self) -> dict[str, str | None]:
        """Return the options of sbatch. None: an option without a value."""
        cluster = self.cluster
        nodes = f"{cluster.nodes}" if cluster.min_nodes is None else f"{cluster.min_nodes}-{cluster.nodes}"
        options: dict[str, str | None] = {
            "job-name": self.run,
            "chdir": str(self.calling),
            "output": str(self.folder / OUTPUT).replace("%", "%%"),
            "open-mode": "append",
            "nodes": nodes,
            "ntasks-per-node": "1",
        }
        options |= {"exclusive": None} if cluster.cpus is None else {"cpus-per-task": str(cluster.cpus)}
        for key in ("partition", "account", "qos", "gres", "constraint"):
            if (value := getattr(cluster, key)) is not None:
                options[key] = value
        notice = cluster.notice_seconds
        if cluster.time_limit is not None:
            options["time"] = cluster.time_limit
            notice = min(notice, (seconds_of(cluster.time_limit) or 0) // 2)
        options["signal"] = f"USR1@{notice}"  # to the tasks, which save a checkpoint
        options["requeue" if cluster.requeue else "no-requeue"] = None
        return options

    def text(self) -> str:
        """Return the batch script."""
        options = [
            f"--{key}" if value is None else f"--{key}={_quoted(value)}" for key, value in self.options().items()
        ]
        directives = [f"#SBATCH {option}" for option in [*options, *self.cluster.sbatch_options]]
        task = [self.python, "-P", "-m", "launcher.clusters.slurm.node", str(self.folder), self.directory]
        if self.cluster.requeue:
            task.append("--requeue")
        task += ["--", *self.command]
        if self.cluster.setup:
            task = [
                "bash",
                "-c",
                "\n".join(["set -e", "trap '' USR1 USR2", *self.cluster.setup, 'exec "$@"']),
                "setup",
                *task,
            ]
        # Ray's workers use all CPUs of a node, so no task is bound to one. A task that is killed ends the step. The
        # first task writes the exit status of the run to a file, because srun prints any other one than 0 as an error.
        step = "srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=0"
        lines = [
            "#!/bin/bash",
            *directives,
            "# Written by launch for sbatch.",
            f"{step} {shlex.join(task)} || exit",
            f"status=$(cat {shlex.quote(str(self.folder / EXIT))})",
        ]
        if self.cluster.requeue:
            lines.append(f'if [ "$status" = {REQUEUE} ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi')
        return "\n".join([*lines, 'exit "$status"', ""])

    def facts(self) -> dict[str, Any]:
        """Return the script, and what it is given, as plain data."""
        return {"script": self.text(), "nodes": self.cluster.nodes, "command": ["launch", *self.command]}

    def submit(self, report: Callable[[str], None]) -> Callable[[], int]:
        """Submit the job. Returns a function that follows it and returns the exit status of the run.

        Raises:
            ClusterError: Slurm is not installed, or does not answer.
            ConfigError: Slurm rejects the job.
            RunError: a job of the same run is in the queue.
        """
        from launcher.clusters.slurm.submission import submit

        return submit(self, report)


def _quoted(value: str) -> str:
    """Return the value of a directive. sbatch removes the quotes; it would end a bare value at a blank."""
    return value if not any(sign.isspace() or sign in "\"'\\" for sign in value) else shlex.quote(value)


def slurm_job(cluster: SlurmCluster, run: str, root: str, words: Sequence[str]) -> SlurmJob:
    """Validate the configuration and return the request.

    Args:
        run, root: run.name and run.root.
        words: the arguments of the command, without those of `cluster` and `run`.

    Raises:
        ConfigError: the request cannot be met by any Slurm.
    """
    if is_gathered(root):
        raise ConfigError(
            f"run.root={root} is a disk of a head that is kept, but a Slurm job has none. Use a directory that all "
            "nodes see, or an object store."
        )
    if cluster.min_nodes == 0 or (cluster.min_nodes or 1) > cluster.nodes:
        raise ConfigError(
            f"cluster.min_nodes={cluster.min_nodes} must be at least 1 and at most cluster.nodes={cluster.nodes}."
        )
    if missing := [name for name in cluster.env if name not in os.environ]:
        raise ConfigError(
            f"cluster.env names {', '.join(missing)}, which is not set in this environment. Export it, or remove it "
            "from cluster.env."
        )
    costs = rate_overrides(cluster, machines=cluster.nodes)
    if cluster.budget_usd is not None:
        costs.append(f"cluster.budget_usd={cluster.budget_usd:g}")
    if cluster.env:
        costs.append(f"cluster.env=[{','.join(cluster.env)}]")
    command = ("train", *words, f"run.name={_word(run)}", f"run.root={_word(root)}", *costs)
    return SlurmJob(run, root, cluster, command, Path.cwd(), folder_of(f"{root.rstrip('/')}/{run}"), sys.executable)


def folder_of(directory: str) -> Path:
    """Return the directory for the files of the job of a run directory: private, and in the home that all nodes see."""
    digest = hashlib.sha256(directory.encode()).hexdigest()[:8]
    return user_state.directory() / "slurm" / f"{Path(directory).name}-{digest}"


def folder_of_run(run: RunDirectory) -> Path:
    """Return the directory for the files of the job of a run."""
    return folder_of(run.display_path())


def _word(value: str) -> str:
    """Return a value in quotes, as Hydra parses it in an override."""
    return '"' + value.replace('"', '\\"') + '"'
