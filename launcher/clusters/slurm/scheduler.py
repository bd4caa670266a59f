"""Submit, query and cancel jobs with Slurm's own programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.clusters.slurm.kind import SlurmCluster
from launcher.errors import ClusterError, ConfigError, LaunchError

_RESPONSE_SECONDS = 120.0  # sbatch itself retries an unreachable controller
WAITING = frozenset(
    {
        *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        *("SUSPENDED", "STOPPED"),
    }
)
ACTIVE = frozenset({"RUNNING", "COMPLETING", "SIGNALING", "RESIZING", "STAGE_OUT"})
# Final states without an exit status of the run -> cause and remedy.
_ENDS = {
    "TIMEOUT": "it reached its time limit before a checkpoint was saved. Raise cluster.notice_seconds or "
    "cluster.time_limit",
    "CANCELLED": "it was cancelled (scancel)",
    "NODE_FAIL": "one of its nodes failed. Set cluster.requeue=true to continue the run on other nodes",
    "PREEMPTED": "it was preempted. Set cluster.requeue=true to continue the run later",
    "OUT_OF_MEMORY": "it used more memory than it had requested. Request more: cluster.sbatch_options=[--mem=64G]",
    "BOOT_FAIL": "one of its nodes did not boot",
    "DEADLINE": "it reached its deadline",
}

# Pattern of an error of sbatch -> the key that caused it, and the remedy. The first match counts.
_REJECTED = (
    (r"[Ii]nvalid account", "account", "`sacctmgr show associations user=$USER` lists your accounts"),
    (r"[Ii]nvalid partition|partition specified", "partition", "`sinfo` lists the partitions"),
    (r"[Ii]nvalid qos", "qos", "`sacctmgr show qos` lists the names"),
    (r"generic resource|gres", "gres", "`sinfo --format='%N %G'` lists the resources of the nodes"),
    (r"[Ff]eature", "constraint", "`sinfo --format='%N %f'` lists the features of the nodes"),
    (r"time limit", "time_limit", "`sinfo --format='%P %l'` lists the limits of the partitions"),
    (
        r"node configuration|[Nn]ode count|processors|CPU count|[Mm]emory",
        "nodes",
        "`sinfo --Node --long` lists the nodes",
    ),
)
_UNREACHABLE = (
    r"contact slurm controller|configuration (source|file)|Socket timed out|connect failure|No route|munge|uthenticat"
)


@dataclass(frozen=True)
class QueueState:
    """The state of a job: Slurm's word for it, and the reason why it waits or has ended."""

    word: str
    reason: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.word in WAITING

    @property
    def is_over(self) -> bool:
        return self.word not in WAITING | ACTIVE

    def explain(self) -> str:
        """Return why a job of this state has ended without an exit status of its run."""
        return _ENDS.get(self.word, f"its state is {self.word} ({self.reason or 'no reason given'})")


def state_in(output: str) -> QueueState | None:
    """Return the state in a line of `squeue --format=%T|%r`; None if there is none."""
    word, _, reason = (output.strip().splitlines() or [""])[0].partition("|")
    return QueueState(word, "" if reason in ("None", "(null)") else reason) if word else None


class Scheduler:
    """The Slurm of this machine.

    Raises:
        ClusterError: every method raises it if Slurm is not installed or does not answer.
    """

    def check(self, script: str, cluster: SlurmCluster, options: Mapping[str, object]) -> None:
        """Let Slurm validate a batch script. Creates nothing.

        Raises:
            ConfigError: Slurm rejects it.
        """
        done = self._run(["sbatch", "--test-only"], script, options)
        if done.returncode != 0:
            raise _rejection(done, cluster)

    def submit(self, script: str, cluster: SlurmCluster, options: Mapping[str, object]) -> str:
        """Submit a batch script, and return the number of the job. Raises ConfigError if Slurm rejects it."""
        done = self._run(["sbatch", "--parsable"], script, options)
        if done.returncode != 0:
            raise _rejection(done, cluster)
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> QueueState | None:
        """Return the state of a job; None if Slurm does not know it, or not any more."""
        done = self._run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r"])
        if done.returncode != 0:
            if "nvalid job id" in done.stderr:
                return None
            raise _failure(done, "squeue")
        return state_in(done.stdout)

    def signal(self, job: str, name: str) -> None:
        """Send a signal to the tasks of a job."""
        self._run(["scancel", f"--signal={name}", job])

    def cancel(self, job: str) -> None:
        """Remove a job that waits; end one that runs. Nothing happens if it is over."""
        self._run(["scancel", job])

    def _run(
        self, words: Sequence[str], stdin: str | None = None, options: Mapping[str, object] | None = None
    ) -> subprocess.CompletedProcess[str]:
        if shutil.which(words[0]) is None:
            raise ClusterError(
                f"cluster=slurm needs {words[0]}, but it is not on PATH. Run this command on a login node of the "
                "cluster, or print the batch script with `launch plan` and submit it there."
            )
        try:
            return subprocess.run(
                words,
                input=stdin,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=_environment(options or {}),
                timeout=_RESPONSE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{words[0]} did not respond within {_RESPONSE_SECONDS:.0f} s. Check the controller: scontrol ping."
            ) from None


def _environment(options: Mapping[str, object]) -> dict[str, str]:
    """Return the environment of sbatch, without the variables that would take precedence over the script."""
    names = {"SBATCH_" + name.upper().replace("-", "_") for name in options} | {"SBATCH_TEST_ONLY", "SBATCH_WAIT"}
    if "time" in options:
        names.add("SBATCH_TIMELIMIT")
    return {name: value for name, value in os.environ.items() if name not in names}


def _rejection(done: subprocess.CompletedProcess[str], cluster: SlurmCluster) -> LaunchError:
    """Return the error for a job that sbatch has rejected."""
    if re.search(_UNREACHABLE, done.stderr):
        return _failure(done, "sbatch")
    for pattern, key, remedy in _REJECTED:
        if re.search(pattern, done.stderr) and (value := getattr(cluster, key)) is not None:
            return ConfigError(f"Slurm rejects cluster.{key}={value}: {_last_line(done)}. {remedy}.")
    return ConfigError(
        f"Slurm rejects the job: {_last_line(done)}. Print the batch script with `launch plan`, and compare its "
        "options with `scontrol show partition`."
    )


def _failure(done: subprocess.CompletedProcess[str], program: str) -> ClusterError:
    return ClusterError(
        f"{program} failed: {_last_line(done)}. Check that the cluster is running (scontrol ping), and that this "
        "machine belongs to it."
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    return text.splitlines()[-1].rstrip(". ")
