"""The kind `ssh`: a Ray cluster on hosts with SSH access."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.clusters.base import ClusterKind, Report
from launcher.config.schema import ClusterConfig, ScalingConfig
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.clusters.remote.registry import Head

# Without a dash at the beginning, which ssh parses as an option, and without special characters of a shell, since a
# ProxyCommand is run by one.
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.+\\-]*"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_IPV6 = r"[0-9a-fA-F:.]+(?:%[A-Za-z0-9_.-]+)?"


@dataclass
class SshCluster(ClusterConfig):
    kind: str = "ssh"
    hosts: list[str] = field(default_factory=list)  # each [USER@]HOST[:PORT], the head first
    user: str | None = None  # for hosts without USER@
    ssh_key: str | None = None  # file of the private key; default: ssh's own choice
    ssh_config: str | None = None  # a file to use instead of ~/.ssh/config
    python: str | None = None  # interpreter of an existing environment on the hosts


class Ssh(ClusterKind):
    name = "ssh"
    config = SshCluster
    is_rented = True
    makes_mounts = True
    provisions = True
    names_hosts = True
    copies_project = True
    exclusive_keys = ("hosts",)

    def check(self, cluster: SshCluster) -> None:
        for host in cluster.hosts:
            if not isinstance(host, str):  # Hydra parses brackets within the list as another list
                raise ConfigError(
                    f"cluster.hosts contains the list {host!r}. Write an IPv6 address without brackets, such as "
                    "fd00::1, or with a port in quotes: 'cluster.hosts=[\"[fd00::1]:22\"]'.",
                    key="cluster.hosts",
                )
            if not re.fullmatch(rf"({_USER}@)?(\[{_IPV6}\](:\d+)?|{_HOST}(:\d+)?|{_IPV6})", host):
                raise ConfigError(
                    f"cluster.hosts contains {host!r}. Write a host as [USER@]HOST[:PORT], such as ada@vm1:22, without "
                    "special characters of ssh or a shell.",
                    key="cluster.hosts",
                )
        if cluster.user is not None and not re.fullmatch(_USER, cluster.user):
            raise ConfigError(
                f"cluster.user is {cluster.user!r}, but must be the name of a user on the hosts, such as ada.",
                key="cluster.user",
            )
        for key in ("ssh_key", "ssh_config"):
            value = getattr(cluster, key)
            if value is not None and (not value or value[0] == "-" or not value.isprintable()):
                raise ConfigError(
                    f"cluster.{key} is {value!r}, but must be the path of a file, such as ~/.ssh/work.",
                    key=f"cluster.{key}",
                )
        twice = [host for host in cluster.hosts if cluster.hosts.count(host) > 1]
        if twice:
            raise ConfigError(
                f"cluster.hosts contains {twice[0]} twice. A host runs one node: name it once.", key="cluster.hosts"
            )
        if cluster.python is not None and not cluster.python.startswith(("/", "~/")):
            raise ConfigError(
                f"cluster.python is {cluster.python!r}, but must be a path on the hosts, such as "
                "/opt/launch/bin/python, or ~/env/bin/python in the home directory of each host.",
                key="cluster.python",
            )

    def known_hosts(self, cluster: ClusterConfig) -> list[dict[str, Any]]:
        from launcher.clusters.ssh import lifecycle

        assert isinstance(cluster, SshCluster)
        return lifecycle.recorded_hosts(cluster)

    def is_remote(self, cluster: ClusterConfig) -> bool:
        return True

    def provision(
        self, cluster: ClusterConfig, report: Report, calling: Path | None = None, scaling: ScalingConfig | None = None
    ) -> Head:
        from launcher.clusters.ssh import lifecycle

        assert isinstance(cluster, SshCluster)
        return lifecycle.up(cluster, report, calling)

    def status(self, head: Head) -> tuple[Head, list[str]]:
        from launcher.clusters.ssh import lifecycle

        return lifecycle.status(head)

    def remove(self, name: str, report: Report) -> None:
        from launcher.clusters.ssh import lifecycle

        lifecycle.down(name, report)


KIND = Ssh()
