"""Hosts that have IPv6 addresses only."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from launcher.clusters.remote import on_host
from launcher.engine import rendezvous
from tests.support.vmlab.ssh_lab import SshLab, processes_left, temporary_files_left


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ("fd77::9 50000 fd77::b 22", "fd77::b"),
        ("::ffff:10.0.0.9 50000 ::ffff:10.0.0.7 22", "10.0.0.7"),  # the server listens on IPv6, the client uses IPv4
        ("10.0.0.9 50000 10.0.0.7 22", "10.0.0.7"),
    ],
)
def test_the_address_is_that_of_the_ssh_connection(
    connection: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    assert on_host._address() == address


@pytest.mark.parametrize("address", ["::1", "fe80::1%eth0", "127.0.0.1"])
def test_an_address_that_other_hosts_cannot_reach_is_not_used(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", f"{address} 50000 {address} 22")
    assert on_host._address() not in (address, "::1")


@needs_ipv6
def test_the_interface_of_an_address() -> None:
    assert on_host.interface_of("::1") == on_host.interface_of("127.0.0.1") == "lo"
    assert on_host.interface_of("2001:db8::1") is None


@needs_ipv6
@pytest.mark.parametrize("address", ["::1", "127.0.0.1"])
def test_a_port_is_free_only_if_it_is_free_with_both_protocols(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as used, socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
        probe.close()
        assert on_host._free_port(0, [used.getsockname()[1], free]) == free


@needs_ipv6
def test_ranks_meet_at_an_ipv6_address() -> None:
    """The store listens on the address of rank 0 alone, as with IPv4."""
    assert rendezvous.own_address("::1") == "::1"
    limit = timedelta(seconds=180)
    store = rendezvous.serve("::1", 2, limit)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", store.port), timeout=5):
        pass
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(rendezvous.join, "::1", store.port, 2, limit)
        joining.result().set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.slow
@pytest.mark.parametrize("ssh_machines", [(2, None, False, True)], indirect=True)
def test_a_run_on_hosts_with_ipv6_addresses(ssh_machines: SshLab) -> None:
    hosts = [f'"[{host.address}]:22"' for host in ssh_machines.machines]
    job = ("--config-dir", "own", "experiment=toy", "scaling.workers=2", "scaling.cpus_per_worker=2", "run.name=six")
    done = ssh_machines.launch(*job, *ssh_machines.words(*hosts), seconds=180)
    assert done.status == 0, done.err
    result = json.loads((ssh_machines.calling / "runs" / "six" / "result.json").read_text())
    assert (result["status"], result["workers"]) == ("completed", 2)
    (found,) = json.loads(ssh_machines.launch("status", "--json").out)
    assert [host["address"] for host in found["hosts"]] == [host.address for host in ssh_machines.machines]
    assert {host["state"] for host in found["hosts"]} == {"lives"}
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0
    assert processes_left(ssh_machines) == temporary_files_left(ssh_machines) == {}
