"""The kind `none`: runs the job in the process of the command, without Ray."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.clusters.base import ClusterKind, Machines
from launcher.clusters.capacity import this_machine
from launcher.config.schema import ClusterConfig


@dataclass
class NoCluster(ClusterConfig):
    kind: str = "none"


class InProcess(ClusterKind):
    name = "none"
    config = NoCluster
    in_process = True
    on_this_machine = True

    def machines(self, cluster: ClusterConfig) -> Machines:
        return Machines([this_machine()], "this process", is_this_machine=True)


KIND = InProcess()
