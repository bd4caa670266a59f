"""Clusters of `cluster=ssh` on this machine, over a real SSH server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote import registry
from launcher.clusters.remote.bootstrap import run_on_host
from launcher.clusters.remote.shell import Shell
from launcher.clusters.ssh import lifecycle
from launcher.clusters.ssh.kind import SshCluster
from launcher.errors import ClusterError, HostError
from tests.support import servers

pytestmark = pytest.mark.skipif(bool(servers.why_no_ssh()), reason=servers.why_no_ssh() or "-")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Server]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "calling").mkdir()
    monkeypatch.chdir(tmp_path / "calling")
    with servers.server(tmp_path / "sshd") as running:
        yield running


def cluster(server: servers.Server, name: str, *hosts: str) -> SshCluster:
    found = list(hosts or ["here"])
    return SshCluster(hosts=found, name=name, ssh_config=str(server.config), python=sys.executable)


@pytest.mark.slow
def test_two_clusters_share_a_host(server: servers.Server) -> None:
    """`up` runs a test job on each: without free ports, the second has no agent that accepts jobs."""
    try:
        heads = [lifecycle.up(cluster(server, name), print) for name in ("anna", "bert")]
        assert len({head.address for head in heads}) == len({head.dashboard for head in heads}) == 2
        lines: list[str] = []
        again = lifecycle.up(cluster(server, "bert"), lines.append)
        assert again == heads[1]
        assert not any("Ray runs" in line for line in lines)
    finally:
        for head in registry.all_heads():
            lifecycle.down(head.name, print)
    assert registry.all_heads() == []


def facts(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change the facts that hosts return."""
    run = lifecycle.run_on_host

    def changed(shell: Any, command: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        found = run(shell, command, *arguments, **options)
        return {**found, **changes.get(shell.name, {})} if command == "look" else found

    monkeypatch.setattr(lifecycle, "run_on_host", changed)


def test_a_head_on_loopback_with_other_hosts_is_an_error(
    server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts(monkeypatch, here={"address": "127.0.0.1"})
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1"):
        lifecycle.up(cluster(server, "a", "here", "other"), print)
    assert registry.all_heads() == []


def test_a_directory_that_cannot_be_written_is_an_error(server: servers.Server, tmp_path: Path) -> None:
    shell = Shell(server.words)
    found = run_on_host(shell, "look", sys.executable, base="/proc/none", cluster="a", python=None)
    shell.close()
    host = lifecycle._Host("here", shell, server.words, facts={"unwritable": "/proc: Permission denied", "base": "/b"})
    assert found["unwritable"] in ("", "/proc: Permission denied")
    with pytest.raises(HostError, match=r"^here .*/b\b"):
        lifecycle._check_writable(host)


def test_missing_hosts_are_named() -> None:
    hosts: list[dict[str, Any]] = [{"name": "vm1", "state": "lives"}, {"name": "vm2", "state": "dead"}]
    hosts.append({"name": "vm3", "state": "dead", "leaving": True})
    head = registry.Head("a", "ssh", ["ssh", "vm1"], "/p", "10.0.0.1:6379", 8265, "/d", hosts=hosts)
    assert head.missing_hosts() == ["vm2"]
