"""Several hosts on one machine: network namespaces connected by links of a given speed, for communication benchmarks.

Every host is a namespace with one interface (`eth0`) and its own address; another namespace contains the switch, so
that this machine's network is not changed and two laboratories do not interfere. A token bucket (tc-tbf(8)) limits the
traffic that a host sends; both directions together carry twice the rate, like a full-duplex link.

    with network(2, "1gbit") as hosts:
        run(hosts, [sys.executable, "-m", "…"])         # one rank per host, with torchrun's variables

Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2. Namespaces are called `launch-PID-TOKEN-…`; those that a
killed process left are removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"launch-(\d+)-[0-9a-f]{6}-(?:hub|\d+)")
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class NoNamespaces(Exception):
    """This machine or user cannot create network namespaces; the message names what is missing."""


class RankFailed(Exception):
    """A rank exited with a status other than 0, or timed out; the message names it, with its last output."""


@dataclass(frozen=True)
class Host:
    """One namespace: its name, and its address in the laboratory."""

    name: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def limit(self, rate: str, delay_ms: float = 0.0) -> None:
        """Limit the host's sending rate (`100mbit`, `1gbit`), and delay each packet."""
        bytes_per_second = bits(rate) / 8
        # At least 4 ms of traffic, and more than the 64 KiB that the kernel sends at once.
        burst = max(256 * 1024, int(bytes_per_second * 0.004))
        tc = ["ip", "netns", "exec", self.name, "tc", "qdisc", "replace", "dev", "eth0"]
        _do(*tc, "root", "handle", "1:", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
        if delay_ms:
            _do(*tc, "parent", "1:", "handle", "10:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")


def bits(rate: str) -> float:
    """Return a rate such as `100mbit` in bits per second; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{rate!r} is not a rate; write it like 100mbit or 1gbit")
    return float(match[1]) * _BITS[match[2]]


def why_not() -> str:
    """Return why namespaces cannot be created here, as a message for the user; an empty string if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root; run it as root (sudo), or omit this measurement"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2 (Debian and Ubuntu: apt-get install iproute2)"
    return ""


@contextlib.contextmanager
def network(hosts: int, rate: str | None = None, delay_ms: float = 0.0, ipv6: bool = False) -> Iterator[list[Host]]:
    """Create the hosts of one network; the end of the block removes them with everything that runs in them.

    Args:
        hosts: number of hosts, 1 to 200.
        rate: sending rate of each host, such as `1gbit`; None for no limit.
        delay_ms: one-way delay of each packet.
        ipv6: the hosts have IPv6 addresses only.

    Raises:
        NoNamespaces: not root, no iproute2, or the kernel refuses.
    """
    if problem := why_not():
        raise NoNamespaces(problem)
    remove_stale()
    prefix = f"launch-{os.getpid()}-{secrets.token_hex(3)}"
    hub = f"{prefix}-hub"
    start = "fd77::" if ipv6 else "10.77.0."
    made = [Host(f"{prefix}-{number}", f"{start}{10 + number}") for number in range(1, hosts + 1)]
    try:
        _do("ip", "netns", "add", hub)
        _do("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
        _do("ip", "-n", hub, "link", "set", "switch", "up")
        for number, host in enumerate(made, start=1):
            _do("ip", "netns", "add", host.name)
            _do("ip", "-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", host.name)
            _do("ip", "-n", hub, "link", "set", f"port{number}", "master", "switch", "up")
            place = [f"{host.address}/64", "nodad"] if ipv6 else [f"{host.address}/24"]
            _do("ip", "-n", host.name, "addr", "add", *place, "dev", "eth0")
            for interface in ("lo", "eth0"):
                _do("ip", "-n", host.name, "link", "set", interface, "up")
            if rate is not None:
                host.limit(rate, delay_ms)
        yield made
    finally:
        for name in (*(host.name for host in made), hub):
            _remove(name)


def run(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 240,
) -> list[str]:
    """Run one rank on every host, with torchrun's variables, and wait for all. Returns the output of each.

    Raises:
        RankFailed: one of them failed, or took longer than `timeout` seconds; the others are ended.
    """
    ranks = start(hosts, command, environment=environment, folder=folder)
    latest = time.monotonic() + timeout
    try:
        waiting = dict(enumerate(ranks))
        while waiting:
            for rank, process in list(waiting.items()):
                if process.poll() is None:
                    continue
                del waiting[rank]
                if process.returncode != 0:
                    raise RankFailed(f"rank {rank} ended with {process.returncode}:\n{_output(process)[-4000:]}")
            if time.monotonic() > latest:
                raise RankFailed(f"rank(s) {sorted(waiting)} had not ended after {timeout:g} s")
            time.sleep(0.01)
        return [_output(process) for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def start(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[subprocess.Popen[str]]:
    """Start one rank on every host and return the processes, each with its own output file as `stdout`."""
    processes = []
    for rank, host in enumerate(hosts):
        facts = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": "29500",  # every laboratory has its own ports
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        sink = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`run` closes it)
        process = subprocess.Popen(
            host.command(command),
            cwd=folder,
            env={**os.environ, **facts, **dict(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        process.stdout = sink
        processes.append(process)
    return processes


def _output(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    process.stdout.seek(0)
    return process.stdout.read()


def names() -> list[str]:
    """Return the existing namespaces of this module, of all processes."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if line and _NAME.fullmatch(line.split()[0])]


def remove_stale() -> None:
    """Remove the namespaces of dead processes, which could not do it when they were killed."""
    for name in names():
        match = _NAME.fullmatch(name)
        if match is not None and not Path(f"/proc/{match[1]}").exists():
            _remove(name)


def _remove(name: str) -> None:
    """Remove one namespace and kill its processes. Never raises, because it runs while other errors are handled."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in inside.split():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaces(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.returncode}")


if __name__ == "__main__":  # python -m benchmarks.namespaces 2 1gbit COMMAND…: one rank per host
    with network(int(sys.argv[1]), sys.argv[2]) as laboratory:
        for number, text in enumerate(run(laboratory, sys.argv[3:])):
            print(f"--- rank {number}\n{text}", end="")
