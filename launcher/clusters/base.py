"""The interface of a cluster kind: all that the rest of launch knows about a cluster.

A kind is one object: a `ClusterKind` named `KIND` in `launcher/clusters/<folder>/kind.py`, or in another package that
registers it in the entry point group `launch.clusters`. A kind defines its configuration keys and their checks, and
executes runs in one of three ways:

- `connect` returns a Ray cluster on which the command places its workers (local, existing);
- `is_remote` is true: the head of the cluster drives the run. `provision` creates the cluster, and the run is submitted
  through the Ray Jobs API (ssh, azure);
- `batch` returns a request that is submitted to a scheduler, which starts all processes (kuberay).

Every command imports the modules `kind`, so they import heavy libraries inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launcher.config import cluster_kinds
from launcher.config.cluster_kinds import KeysOfKind
from launcher.config.schema import ClusterConfig, ScalingConfig
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.clusters.capacity import Node
    from launcher.clusters.existing.existing_ray import ExistingRay
    from launcher.clusters.local.embedded_ray import EmbeddedRay
    from launcher.clusters.remote.registry import Head
    from launcher.runs import RunDirectory

Report = Callable[[str], None]


@dataclass(frozen=True)
class Machines:
    """The nodes on which the workers of a run can be placed.

    Attributes:
        nodes: the nodes, each with the CPUs and GPUs that Ray may assign.
        where: a description for messages, such as `this machine`.
        is_this_machine: whether the only node is the machine of the command.
    """

    nodes: Sequence[Node]
    where: str
    is_this_machine: bool = False


@dataclass(frozen=True)
class Use:
    """The options with which a command connects to Ray; see `EmbeddedRay` and `ExistingRay`.

    Attributes:
        python_path: directories that the workers prepend to `sys.path`.
        directory: the run directory, a path or a URI.
        verbose: whether Ray's own messages are printed.
        preload: the name of a module that is imported while Ray starts.
        is_sweep: whether the workers train several runs.
        report: prints a line for the user.
    """

    python_path: Sequence[str]
    directory: str
    verbose: bool
    preload: str
    is_sweep: bool = False
    report: Report = lambda text: None


class Batch(Protocol):
    """A run or sweep that can be submitted to a scheduler. A value: nothing is created before `submit`."""

    @property
    def directory(self) -> str:
        """Return the run directory, a path or a URI."""

    def text(self) -> str:
        """Return the document for the scheduler: a manifest or a script."""

    def facts(self) -> dict[str, Any]:
        """Return the same content as plain data, for `launch plan --json`."""

    def submit(self, report: Report) -> Callable[[], int]:
        """Submit the run. Returns a function that waits for the end of the run and returns its exit status.

        Args:
            report: called with each line for the user.

        Raises:
            ClusterError: the scheduler rejects the run, or cannot be reached.
        """


class WaitingRun(Protocol):
    """A run that a scheduler has accepted and that does not train: it has not started yet, or it waits to continue."""

    def await_start(self, report: Report) -> None:
        """Report the state until the run trains, or is not waiting any more."""

    def cancel(self) -> str:
        """Remove the run from the scheduler, and return a line that describes the result."""


class ClusterKind(KeysOfKind):
    """The base class of cluster kinds. A kind overrides the methods that it supports; the defaults raise an error.

    Attributes:
        is_batch: runs are submitted to a scheduler; see `batch`.
        shares_files: the nodes of a scheduler see the files of this machine under the same paths.
        provisions: `launch up`, `status` and `down` create, show and remove clusters of this kind.
        names_hosts: the hosts are named in the configuration and recorded, so that `launch plan` needs no connection;
            see `known_hosts`.
        copies_project: `provision` copies the calling directory to every host. Otherwise it is sent with each run.
    """

    is_batch = False
    shares_files = False
    provisions = False
    names_hosts = False
    copies_project = False

    # ---- planning ----

    def machines(self, cluster: ClusterConfig) -> Machines:
        """Return the nodes on which the workers of a run can be placed. Creates nothing.

        Raises:
            LaunchError: this command does not know the nodes, or they do not answer.
        """
        raise ConfigError(
            f"cluster={self.name}: `launch train` submits runs and sweeps to this kind of cluster. `launch plan "
            f"cluster={self.name}` needs cluster.size=SIZE."
        )

    def known_hosts(self, cluster: ClusterConfig) -> list[dict[str, Any]]:
        """Return the named hosts of a cluster with the recorded facts of each. Opens no connection."""
        raise ConfigError(f"cluster={self.name} has no named hosts to plan for.")

    # ---- running ----

    def connect(self, cluster: ClusterConfig, use: Use) -> AbstractContextManager[EmbeddedRay | ExistingRay]:
        """Return a context manager whose value is the Ray cluster for the workers of a command."""
        raise NotImplementedError(f"cluster={self.name} does not implement connect()")

    def is_remote(self, cluster: ClusterConfig) -> bool:
        """Return whether the head of the cluster drives runs with this configuration, through Ray Jobs."""
        return False

    def jobs_url(self, cluster: ClusterConfig) -> str | None:
        """Return the URL of the Ray Jobs API for remote runs, or None to use the head that `provision` returns."""
        return None

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> Batch:
        """Return the request that submits a run to the scheduler.

        Args:
            run, root: run.name and run.root.
            words: the arguments of the command on the cluster, without those of `cluster` and `run`.
            ask: whether to query the public price list for today's prices.

        Raises:
            ConfigError: a key that the scheduler needs is missing or wrong.
        """
        raise NotImplementedError(f"cluster={self.name} does not implement batch()")

    def waiting(self, run: RunDirectory) -> WaitingRun | None:
        """Return a run that waits in the scheduler, for `launch logs` and `launch stop`; None if it does not wait."""
        return None

    # ---- clusters that launch creates ----

    def provision(
        self, cluster: ClusterConfig, report: Report, calling: Path | None = None, scaling: ScalingConfig | None = None
    ) -> Head:
        """Create the configured cluster, or return it if it exists. Idempotent.

        Args:
            report: called with each line for the user.
            calling: the directory from which runs are started; None: the current directory.
            scaling: determines the number of workers of the run; None: as many as fit.

        Raises:
            ConfigError: this kind creates no clusters, or the configuration is wrong.
            ClusterError: the cluster cannot be created. Nothing was created.
            MachineError: the creation failed after it began.
        """
        raise ConfigError(
            f"cluster={self.name} creates no clusters. Use `launch up` with cluster=ssh or cluster=azure."
        )

    def status(self, head: Head) -> tuple[Head, list[str]]:
        """Return the current state of a cluster, and notes for its user, one sentence each."""
        return head, []

    def remove(self, name: str, report: Report) -> None:
        """Remove a cluster and stop everything that runs on it."""
        raise ConfigError(f"cluster={self.name} creates no clusters, so there is none to remove.")

    # ---- processes on this machine between commands ----

    def session(self) -> Session | None:
        """Return the session that commands of this kind keep running on this machine, or None."""
        return None


class Session(Protocol):
    """Processes that a kind keeps running on this machine between commands; for `launch status` and `launch down`."""

    def facts(self) -> dict[str, Any]:
        """Return name, kind, state and other facts as plain data, for `--json`."""

    def text(self) -> str:
        """Return a description of the session in one line."""

    def end(self, report: Report) -> None:
        """Stop the session. Raises MachineError if a process remains."""


def kind_of(cluster: ClusterConfig) -> ClusterKind:
    """Return the registered kind of a cluster configuration."""
    kind: ClusterKind = cluster.of_kind
    return kind


def kinds() -> list[ClusterKind]:
    """Return all registered kinds."""
    return list(cluster_kinds.all_kinds().values())


def named(name: str) -> ClusterKind:
    """Return the kind with this name. Raises ConfigError if none is registered."""
    kind: ClusterKind | None = cluster_kinds.find(name)
    if kind is None:
        raise ConfigError(
            f"No cluster kind {name} is installed on this machine. Installed kinds: "
            f"{', '.join(cluster_kinds.all_kinds())}. Install the package that provides {name}."
        )
    return kind


def in_process() -> ClusterKind:
    """Return the kind that runs jobs in the process of the command."""
    kind: ClusterKind = cluster_kinds.one_with("in_process")
    return kind


def attached(cluster: ClusterConfig, address: str) -> ClusterConfig:
    """Return the configuration of a driver that connects to the running Ray at `address`. Common keys are retained."""
    return cluster.changed_to(cluster_kinds.one_with("attaches"), address=address)
