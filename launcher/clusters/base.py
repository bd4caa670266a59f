"""What a kind of cluster is, for everything outside of its folder.

A kind is one object: a `ClusterKind` named `KIND` in `launcher/clusters/<folder>/kind.py`, or in another package that
names it in the entry point group `launch.clusters`. It brings its keys, checks and words, and does one of three things
with a run:

- `connect`: gives the command a Ray to run the workers on (local, existing);
- `is_remote`: the run is driven by the head of a cluster; `provision` makes the cluster, Ray Jobs take the run there;
- `batch`: the run is handed to a scheduler as a whole, which starts everything (kuberay).

Modules `kind` are imported by every command: they import heavy libraries on use.
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

Report = Callable[[str], None]


@dataclass(frozen=True)
class Machines:
    """Where workers can sit.

    Attributes:
        nodes: each with what Ray may give away of it.
        where: the words for the place.
        is_this_machine: the nodes are this one machine.
    """

    nodes: Sequence[Node]
    where: str
    is_this_machine: bool = False


@dataclass(frozen=True)
class Use:
    """What a command needs a Ray for; see `EmbeddedRay` and `ExistingRay`.

    Attributes:
        python_path: directories whose modules the workers need.
        directory: of the run, a path or a URI.
        verbose: with Ray's messages.
        preload: a module that is imported while Ray starts.
        is_sweep: the workers train many runs.
    """

    python_path: Sequence[str]
    directory: str
    verbose: bool
    preload: str
    is_sweep: bool = False


class Batch(Protocol):
    """A run, or a sweep, as a scheduler is asked for it. A value: nothing is created before `submit`."""

    @property
    def directory(self) -> str:
        """Where the run is written."""

    def text(self) -> str:
        """Return what the scheduler is given: a manifest, a script."""

    def facts(self) -> dict[str, Any]:
        """Return the same for programs."""

    def submit(self, report: Report) -> Callable[[], int]:
        """Hand the run to the scheduler. The result follows the run to its end and returns the exit status."""


class ClusterKind(KeysOfKind):
    """One kind of cluster. Override what the kind does; the defaults refuse it in one paragraph.

    Attributes:
        is_batch: runs are handed to a scheduler; see `batch`.
        provisions: `launch up`, `status` and `down` make, show and remove its clusters.
        names_hosts: its machines are named and recorded, so that `launch plan` works without them; see `known_hosts`.
        copies_project: `provision` copies the calling directory to every host; otherwise it is sent with the run.
    """

    is_batch = False
    provisions = False
    names_hosts = False
    copies_project = False

    # ---- planning ----

    def machines(self, cluster: ClusterConfig) -> Machines:
        """Return where the workers of a run can sit. Creates nothing.

        Raises:
            LaunchError: the machines are not known to this command, or cannot be asked.
        """
        raise ConfigError(
            f"cluster={self.name}: `launch train` sends runs and sweeps to such a cluster; `launch plan "
            f"cluster={self.name}` needs cluster.size=SIZE."
        )

    def known_hosts(self, cluster: ClusterConfig) -> list[dict[str, Any]]:
        """Return the named hosts of a cluster with what was recorded of each, without a connection."""
        raise ConfigError(f"cluster={self.name} has no named hosts to plan for.")

    # ---- running ----

    def connect(self, cluster: ClusterConfig, use: Use) -> AbstractContextManager[EmbeddedRay | ExistingRay]:
        """Return the Ray that a command runs its workers on, to be entered."""
        raise NotImplementedError(f"cluster={self.name} gives no Ray to a command")

    def is_remote(self, cluster: ClusterConfig) -> bool:
        """Whether runs with this configuration are driven by the head of a cluster, through Ray Jobs."""
        return False

    def jobs_url(self, cluster: ClusterConfig) -> str | None:
        """Return the URL of the Ray Jobs API to which a remote run is sent; None: through the head of `provision`."""
        return None

    def batch(self, cluster: ClusterConfig, run: str, root: str, words: Sequence[str], ask: bool = True) -> Batch:
        """Return a run as the scheduler is asked for it.

        Args:
            run, root: run.name and run.root.
            words: of the command on the cluster, without those about cluster and run.
            ask: the public price list for today's prices.

        Raises:
            ConfigError: what the scheduler needs is missing or wrong.
        """
        raise NotImplementedError(f"cluster={self.name} hands no run to a scheduler")

    # ---- clusters that launch makes ----

    def provision(
        self, cluster: ClusterConfig, report: Report, calling: Path | None = None, scaling: ScalingConfig | None = None
    ) -> Head:
        """Make the cluster that is configured, or find that it is there. Idempotent.

        Args:
            calling: the directory that runs are started from; None: the current one.
            scaling: how many workers a run has; None: as many as fit.
        """
        raise ConfigError(f"cluster={self.name} makes no cluster.")

    def status(self, head: Head) -> tuple[Head, list[str]]:
        """Return a cluster as it is now, and sentences that its user has to know."""
        return head, []

    def remove(self, name: str, report: Report) -> None:
        """End a cluster with all that runs on it."""
        raise ConfigError(f"cluster={self.name} makes no cluster, so there is none to remove.")

    # ---- what stays on this machine between commands ----

    def session(self) -> Session | None:
        """Return what commands of this kind have left running on this machine, for the next one."""
        return None


class Session(Protocol):
    """What one kind keeps running on this machine between commands, as `launch status` and `down` see it."""

    def facts(self) -> dict[str, Any]:
        """Return it for programs: name, kind, state…"""

    def text(self) -> str:
        """Return it for people, in one line."""

    def end(self, report: Report) -> None:
        """End it. Raises MachineError where something is left."""


def kind_of(cluster: ClusterConfig) -> ClusterKind:
    """Return the kind of a cluster."""
    kind: ClusterKind = cluster.of_kind
    return kind


def kinds() -> list[ClusterKind]:
    """Return all registered kinds."""
    return list(cluster_kinds.all_kinds().values())


def named(name: str) -> ClusterKind:
    """Return a kind by its name. Raises ConfigError where none is registered."""
    kind: ClusterKind | None = cluster_kinds.find(name)
    if kind is None:
        raise ConfigError(
            f"No cluster kind {name} is installed here. There are {', '.join(cluster_kinds.all_kinds())}; install the "
            f"package that brings {name}."
        )
    return kind


def in_process() -> ClusterKind:
    """Return the kind whose jobs run in the process of the command."""
    kind: ClusterKind = cluster_kinds.one_with("in_process")
    return kind


def attached(cluster: ClusterConfig, address: str) -> ClusterConfig:
    """Return the configuration of a driver that uses the running Ray at `address`; common keys stay."""
    return cluster.changed_to(cluster_kinds.one_with("attaches"), address=address)
