"""A lab of machines that are reached only over SSH, and a laptop.

    with SshLab(2) as lab:                               # homes_differ=True, ipv6=True: other paths, addresses
        lab.launch("up", "cluster=ssh", *lab.words())    # a command of the user, on the laptop
        lab.machines[1].kill()                           # power failure
        lab.start_sshd(lab.machines[1])                  # reboot, without other processes

Every machine has its own SSH server, host key and home directory. The laptop has a key that all machines accept, and
knows their host keys.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import servers
from tests.support.command import PROJECT, Result
from tests.support.vmlab.lab import ROOT, Host, Lab
from tests.support.vmlab.lab import why_not as why_no_lab
from tests.support.waiting import limit, wait_for

PORT = 22


def why_not() -> str:
    """Return the reason why the lab cannot be created here; empty if it can."""
    return servers.why_no_ssh() or why_no_lab()


class SshLab(Lab):
    """Machines with SSH servers, and a laptop without one (the last host)."""

    apart = True

    def __init__(self, machines: int, rate: str | None = None, homes_differ: bool = False, ipv6: bool = False) -> None:
        super().__init__(machines + 1, rate, ipv6)
        self._homes_differ = homes_differ

    def __enter__(self) -> SshLab:
        super().__enter__()
        try:
            self._prepare()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    @property
    def machines(self) -> list[Host]:
        return self.hosts[:-1]

    @property
    def laptop(self) -> Host:
        return self.hosts[-1]

    @property
    def config(self) -> Path:
        return self.directory / "config"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    def home_of(self, host: Host) -> Path:
        return self.home / host.name if self._homes_differ else self.home

    def mount_home(self, host: Host) -> str:
        if not self._homes_differ:
            return super().mount_home(host)
        own = self.home_of(host)
        return f"mount -t tmpfs tmpfs {self.home} && mkdir {own} && mount --bind {self.own(host)} {own}"

    def _prepare(self) -> None:
        servers.make_key(self.key)
        for host in self.machines:
            self._server(host)
        known = self.directory / "known_hosts"
        known.write_text("".join(servers.known_host(self._etc(host), host.address, PORT) for host in self.machines))
        servers.write_client(
            self.config, {host.name: f"{host.address}:{PORT}" for host in self.machines}, self.key, known
        )
        for host in self.machines:
            self.start_sshd(host)

    def _etc(self, host: Host) -> Path:
        return self.directory / f"etc-{host.name}"

    def _server(self, host: Host) -> None:
        etc = self._etc(host)
        etc.mkdir()
        more = [f"TMPDIR={self.scratch}", "OMP_NUM_THREADS=1", "RAY_memory_monitor_refresh_ms=0"]
        servers.write_server(etc, self.key.with_suffix(".pub"), self.home_of(host), host.address, PORT, more)

    def start_sshd(self, host: Host) -> None:
        command = [
            servers.SSHD,
            "-D",
            "-f",
            str(self._etc(host) / "sshd_config"),
            "-E",
            str(self._etc(host) / "sshd.log"),
        ]
        log = self._etc(host) / "sshd.log"
        before = _listened(log)
        process = host.start(command)

        def listens() -> bool:
            nonlocal process
            if process.poll() is not None:  # its predecessor still holds the port
                process = host.start(command)
            return _listened(log) > before

        wait_for(listens, 10, lambda: f"sshd of {host.name} does not listen: {log.read_text()[-500:]}")

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a command on the laptop: without Ray's variables, with its own directories."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_", "LAUNCH_"))
        }
        own = {
            "HOME": str(self.own(self.laptop)),
            "XDG_STATE_HOME": str(self.own(self.laptop) / "state"),
            "XDG_RUNTIME_DIR": str(self.directory),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        return {**inherited, **own, **(more or {})}

    def words(self, *hosts: str, **keys: str) -> list[str]:
        """Return the overrides for a cluster of these hosts; default: all machines."""
        names = ",".join(hosts or [host.name for host in self.machines])
        found = {"ssh_config": str(self.config), "python": sys.executable, **keys}
        return ["cluster=ssh", f"cluster.hosts=[{names}]", *(f"cluster.{key}={value}" for key, value in found.items())]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "launcher", *words]

    def launch(self, *words: str, seconds: float = 110, cwd: Path | None = None, **env: str) -> Result:
        """Run `launch` on the laptop to its end."""
        done = subprocess.run(
            self.laptop.command(self.command(*words), cwd or self.calling),
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit(seconds),
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[bytes]:
        """Start `launch` on the laptop. Its output is in `laptop.log()`."""
        with (self.own(self.laptop) / "log").open("ab") as sink:
            process = subprocess.Popen(
                self.laptop.command(self.command(*words), cwd or self.calling),
                env=self.environment(env),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def calling(self) -> Path:
        """A directory with a project of the laptop's user."""
        path = self.own(self.laptop) / "calling"
        if not path.exists():
            shutil.copytree(PROJECT, path, ignore=shutil.ignore_patterns("__pycache__"))
        return path

    def of_clusters(self, host: Host) -> list[str]:
        """Return the processes on a machine other than its SSH server and sessions."""
        own: Sequence[str] = (servers.SSHD, "sshd:", "nsenter ")
        return [words for words in host.processes().values() if words and not words.startswith(tuple(own))]


def _listened(log: Path) -> int:
    """Return how often the server has started to listen."""
    return log.read_text().count("Server listening on") if log.exists() else 0


def processes_left(ssh_machines: SshLab) -> dict[str, list[str]]:
    """Return the processes of clusters by machine, without machines that have none."""
    found = {host.name: ssh_machines.of_clusters(host) for host in ssh_machines.machines}
    return {name: words for name, words in found.items() if words}


def temporary_files_left(ssh_machines: SshLab) -> dict[str, list[str]]:
    """Return the content of the machines' temporary folders by machine, without machines on which it is empty."""
    listed = {host.name: host.run(["ls", "-A", str(ssh_machines.scratch)]) for host in ssh_machines.machines}
    assert all(done.returncode == 0 for done in listed.values()), listed
    return {name: done.stdout.split() for name, done in listed.items() if done.stdout}


def seen_everywhere(ssh_machines: SshLab, secret: str, environments: bool = True) -> list[str]:
    """Return where a secret is visible: command lines and environments of processes, and files.

    A file `token` that only its user can read is not a finding.
    """
    found = []
    for host in ssh_machines.hosts:
        for pid, words in host.processes().items():
            if secret in words:
                found.append(f"command line on {host.name}: {words}")
            try:
                if environments and secret.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(f"environment on {host.name}: {words}")
            except OSError:
                continue
    for folder, _, names in os.walk(ssh_machines.directory):
        for path in (Path(folder, name) for name in names):
            if path.is_file() and secret.encode() in path.read_bytes():
                mode = path.stat().st_mode & 0o777
                if path.name != "token" or mode != 0o600:
                    found.append(f"{path} ({mode:o})")
    return found
