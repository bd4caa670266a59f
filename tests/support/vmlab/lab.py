"""Virtual machines on this machine: each has an address, a host name, a mount namespace and a node of Ray.

    with Lab(3) as lab:                     # three hosts without processes
        lab.head.start_ray()
        lab.hosts[1].start_ray()
        lab.wait_for_nodes(2)
        lab.head.run(["launch", "cluster=existing", …])
        lab.hosts[1].cut()                  # its link; restore_link() connects it again
        lab.hosts[1].kill()                 # all of its processes, as by a power failure

`benchmarks.namespaces` creates the links. The hosts share all files, as on a network file system, except Ray's
(`Lab.scratch`), which are in a tmpfs of each host. It needs root, iproute2 and util-linux. At the end, all processes
and namespaces are removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import namespaces
from tests.support.waiting import limit, wait_for

ROOT = Path(__file__).resolve().parents[3]
PORT = 6379
OBJECT_STORE_BYTES = 80_000_000
# Ray on a host: no usage reports, and no memory monitor, which would measure the whole machine.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "OMP_NUM_THREADS": "1",
}
DRAIN = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
for node, info in client.get_all_node_info().items():
    if info.node_manager_address == sys.argv[2] and info.state == 0:
        print(client.drain_node(node.hex(), 2, "spot eviction", int((time.time() + float(sys.argv[3])) * 1000)))
"""


def why_not() -> str:
    """Return the reason why the lab cannot be created here; empty if it can."""
    if problem := namespaces.why_not():
        return problem
    missing = [program for program in ("unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install util-linux and mount"
    try:
        with namespaces.network(1):
            return ""
    except namespaces.NoNamespaces as problem:
        return str(problem)


class Host:
    """One machine of a lab."""

    def __init__(self, lab: Lab, number: int, link: namespaces.Host) -> None:
        self.name = f"vm{number}"
        self.address = link.address
        self.ray: subprocess.Popen[bytes] | None = None
        self.worn = False  # the head may declare its node dead, or drain it, at any time
        self._lab = lab
        self._link = link
        self._home = lab.directory / self.name
        self._home.mkdir()
        (self._home / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        # This process owns the namespaces, which all others enter, and reaps orphaned processes.
        script = (
            f"hostname {self.name} && mount --bind {self._home}/hosts /etc/hosts && {lab.mount_home(self)} "
            f"&& mount -t tmpfs -o size=1g tmpfs {lab.scratch} "
            "&& echo ready && while :; do sleep 1000 & wait $!; done"
        )
        apart = ["--pid", "--fork", "--mount-proc"] if lab.apart else []
        self._keeper = subprocess.Popen(
            link.command(["unshare", "--mount", "--uts", *apart, "sh", "-c", script]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == b"ready\n", f"{self.name} did not start"
        self._within = _child(self._keeper.pid) if lab.apart else self._keeper.pid
        self._keepers = {self._keeper.pid, self._within}

    def command(self, words: Sequence[str], cwd: Path | None = None) -> list[str]:
        """Return the command that runs `words` on this host, by default in its home directory."""
        place = ["nsenter", "-t", str(self._within), "--net", "--mount", "--uts", f"--wdns={cwd or self._home}"]
        return [*place, *(["--pid"] if self._lab.apart else []), *words]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a process on this host."""
        own = {
            "HOME": str(self._home),
            "RAY_AUTH_TOKEN": self._lab.token,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **RAY_ENVIRONMENT, **own, **(more or {})}

    def start(
        self, words: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, log: str = "log"
    ) -> subprocess.Popen[bytes]:
        """Start a process on this host. Its output is written to a file in the home directory of the host."""
        with (self._home / log).open("ab") as sink:
            process = subprocess.Popen(
                self.command(words, cwd),
                env=self.environment(env),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self._lab.started.append(process)
        return process

    def run(
        self, words: Sequence[str], cwd: Path | None = None, seconds: float = 60, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        return subprocess.run(
            self.command(words, cwd),
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit(seconds),
            check=False,
        )

    def log(self, name: str = "log") -> str:
        path = self._home / name
        return path.read_text(errors="replace") if path.exists() else ""

    def start_ray(self, cpus: float = 1, env: Mapping[str, str] | None = None) -> None:
        """Start this host's node of Ray: the first host's is the head, the others join it."""
        place = (
            ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._lab.scratch}"]
            if self is self._lab.head
            else [f"--address={self._lab.address}"]
        )
        # A killed head leaves a file with its address; Ray would not start while another lab has a head with the same
        # address.
        self.run(["rm", "-f", f"{self._lab.scratch}/ray_current_cluster"])
        ray = Path(sys.executable).with_name("ray")
        words = [str(ray), "start", *place, f"--node-ip-address={self.address}", f"--num-cpus={cpus:g}", "--block"]
        words += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        self.ray = self.start(words, env=env, log="ray.log")

    def processes(self) -> dict[int, str]:
        """Return the command line of every process on this host by process id (in the namespace of this machine)."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._link.name], capture_output=True, text=True, check=False
        ).stdout
        found = {}
        for pid in map(int, listed.split()):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return {pid: words for pid, words in found.items() if pid not in self._keepers and words != "sleep 1000 "}

    def find(self, text: str) -> list[int]:
        """Return the processes whose title or command line contains `text`."""
        return [pid for pid, words in self.processes().items() if text in words]

    def cut(self) -> None:
        """Take the link down. Open connections are not closed."""
        self.worn = True
        subprocess.run(self._link.command(["ip", "link", "set", "eth0", "down"]), check=True)

    def restore_link(self) -> None:
        subprocess.run(self._link.command(["ip", "link", "set", "eth0", "up"]), check=True)

    def rate(self, rate: str, delay_ms: float = 0.0) -> None:
        """Limit the rate at which this host sends, such as `100mbit`."""
        self._link.limit(rate, delay_ms)

    def drain(self, seconds: float) -> None:
        """Make Ray drain the node of this machine with a deadline in `seconds`."""
        self.worn = True
        words = [sys.executable, "-c", DRAIN, self._lab.address, self.address, str(seconds)]
        done = self._lab.head.run(words)
        assert "True" in done.stdout, done.stdout + done.stderr[-2000:]

    def kill(self) -> None:
        """Kill all processes, as by a power failure. `start_ray` starts Ray again."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.ray is not None:
            self.ray.wait(240)
            self.ray = None
        self.worn = False

    def close(self) -> None:
        self.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._keeper.pid, signal.SIGKILL)
        self._keeper.wait(240)
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()


def _child(pid: int) -> int:
    """Return the only child of a process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class Lab:
    """Hosts on one network. `hosts[0]` is the head of their Ray."""

    apart = False  # hosts do not see each other's processes

    def __init__(self, hosts: int, rate: str | None = None, ipv6: bool = False) -> None:
        self._count, self._rate, self._ipv6 = hosts, rate, ipv6
        self._cleanup = contextlib.ExitStack()
        self.started: list[subprocess.Popen[bytes]] = []
        self.token = secrets.token_hex(32)
        self.hosts: list[Host] = []

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as cleanup:
            for path in Path("/tmp").glob("lab-*-*"):  # of a test process that was killed
                if not Path("/proc", path.name.split("-")[1]).exists():
                    shutil.rmtree(path, ignore_errors=True)
            # A short path, since it contains Ray's sockets.
            self.directory = Path(tempfile.mkdtemp(prefix=f"lab-{os.getpid()}-", dir="/tmp"))
            cleanup.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.scratch = self.directory / "r"
            self.scratch.mkdir()
            self.home = self.directory / "home"  # each host sees its own here
            self.home.mkdir()
            links = namespaces.network(self._count, self._rate, ipv6=self._ipv6)
            for number, link in enumerate(cleanup.enter_context(links), start=1):
                host = Host(self, number, link)
                cleanup.callback(host.close)
                self.hosts.append(host)
            cleanup.callback(self._reap)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def nodes(self) -> list[str]:
        """Return the addresses of the nodes that the head treats as alive."""
        code = "import sys; from ray._raylet import GcsClient\n"
        code += "found = GcsClient(address=sys.argv[1]).get_all_node_info().values()\n"
        code += "print(*sorted(one.node_manager_address for one in found if one.state == 0))"
        done = self.head.run([sys.executable, "-c", code, self.address])
        return done.stdout.split()

    def wait_for_nodes(self, count: int, seconds: float = 60) -> None:
        def complaint() -> str:
            logs = "\n".join(f"{host.name}: {host.log('ray.log')[-1500:]}" for host in self.hosts)
            return f"expected {count} nodes, found {self.nodes()}\n{logs}"

        wait_for(lambda: len(self.nodes()) == count, seconds, complaint)

    def restore(self, nodes: int = 2) -> None:
        """Restore all links, and run Ray on the first `nodes` hosts only."""
        if any(host.worn for host in self.hosts):  # the head may have wrong records of nodes: restart all
            for host in self.hosts:
                host.restore_link()
                host.kill()
        for number, host in enumerate(self.hosts):
            lives = host.ray is not None and host.ray.poll() is None
            if (number >= nodes or not lives) and host.processes():
                host.kill()
                lives = False
            if number < nodes and not lives:
                if host is self.head:
                    for other in self.hosts[1:]:
                        other.kill()
                host.start_ray()
                self.wait_for_nodes(1 if host is self.head else len({*self.nodes(), host.address}))
        self.wait_for_nodes(nodes)

    def own(self, host: Host) -> Path:
        """Return the directory that a machine mounts as its home."""
        return self.directory / host.name

    def home_of(self, host: Host) -> Path:
        """Return the path of a machine's home on this machine."""
        return self.home

    def mount_home(self, host: Host) -> str:
        """Return the shell command with which a machine mounts its home."""
        return f"mount --bind {self.own(host)} {self.home}"

    def _reap(self) -> None:
        for host in self.hosts:
            host.kill()
        for process in self.started:
            process.wait(240)
