"""During a run, hosts of a cluster listen beyond loopback only on the ports in docs/security.md."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.support.vmlab import ssh_lab
from tests.support.vmlab.lab import Host
from tests.support.vmlab.ssh_lab import SshLab
from tests.support.waiting import wait_for

# (what the process is, which of its ports) as the table of docs/security.md has it.
RAY = r"raylet|ray::|/dashboard/agent\.py|/runtime_env/agent/main\.py|ray\S*/default_worker\.py"


DRIVER = r"launcher\.driver"  # a worker of Ray as well
RAY_WORKERS = range(10002, 20000)
RAY_CLIENT = 10001


@dataclass(frozen=True)
class Socket:
    address: str
    port: int
    owner: str

    @property
    def is_loopback(self) -> bool:
        return self.address not in ("*", "0.0.0.0", "::") and ip_address(self.address).is_loopback


def sockets(host: Host) -> list[Socket]:
    """Return the listening sockets in the network namespace of a host, from `ss -ltnp`."""
    shown = subprocess.run(
        ["ip", "netns", "exec", host._link.name, "ss", "-ltnpH"], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for line in shown.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        pids = re.findall(r"pid=(\d+)", line)
        words = Path(f"/proc/{pids[0]}/cmdline").read_bytes().replace(b"\0", b" ").decode() if pids else ""
        found.append(Socket(address.strip("[]").partition("%")[0].removeprefix("::ffff:"), int(port), words))
    return found


def is_named(socket: Socket, host: Host, gcs: int) -> bool:
    """Return whether docs/security.md lists a socket that listens beyond loopback."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if "sshd" in socket.owner:
        return socket.port == ssh_lab.PORT
    if "gcs_server" in socket.owner:
        return socket.port == gcs or low <= socket.port <= high
    if "ray.util.client.server" in socket.owner:
        return (socket.address, socket.port) == (host.address, RAY_CLIENT)
    of_ray = bool(re.search(f"{RAY}|{DRIVER}", socket.owner))
    return of_ray and (low <= socket.port <= high or socket.port in RAY_WORKERS)


@pytest.mark.slow
def test_only_the_named_ports_listen_beyond_loopback(ssh_machines: SshLab) -> None:
    words = ["--config-dir", "own", "experiment=toy", "trainer.steps=1000000", "checkpoint.every=200"]
    words += ["scaling.workers=2", "scaling.cpus_per_worker=2", "run.name=long", *ssh_machines.words()]
    ssh_machines.start(*words)
    metrics = ssh_machines.calling / "runs" / "long" / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2,
        240,
        lambda: ssh_machines.laptop.log()[-3000:],
    )
    (record,) = (ssh_machines.own(ssh_machines.laptop) / "state" / "launch" / "clusters").glob("*.json")
    gcs = int(json.loads(record.read_text())["address"].rpartition(":")[2])
    for host in ssh_machines.machines:
        found = sockets(host)
        assert any(one.is_loopback for one in found)
        assert any("raylet" in one.owner for one in found), "Ray's sockets were not found"
        assert any("ray::" in one.owner and one.address == host.address for one in found), "nor those of gloo"
        unnamed = [one for one in found if not one.is_loopback and not is_named(one, host, gcs)]
        assert unnamed == [], "\n".join(f"{one.address}:{one.port} {one.owner.strip()[:80]}" for one in unnamed)
    assert ssh_machines.launch("stop", "long", seconds=100).status == 0
    assert ssh_machines.launch("down", "ssh", seconds=60).status == 0
