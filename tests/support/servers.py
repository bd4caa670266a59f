"""An SSH server of a test's own: own port, host key, user's key and known hosts, on loopback or in a namespace."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for


class HttpServer(ThreadingHTTPServer):
    """A server whose threads do not print errors of disconnected clients, which would be output of the next test."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def why_no_ssh() -> str:
    """Return what is missing for tests of SSH; empty where nothing is."""
    found = {
        "openssh-server": Path(SSHD).exists(),
        "openssh-client": shutil.which("ssh"),
        "rsync": shutil.which("rsync"),
    }
    missing = [name for name, there in found.items() if not there]
    return f"install {' and '.join(missing)}" if missing else ""


def make_key(path: Path) -> Path:
    """Make a key pair: `path` and `path.pub`."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def write_server(
    directory: Path, public_key: Path, home: Path, address: str, port: int, more: Sequence[str] = ()
) -> list[str]:
    """Write what a server needs; return its command. What comes in has `home` as HOME, and `more`, NAME=value each."""
    host_key = make_key(directory / "host_key")
    authorized = directory / "authorized_keys"
    authorized.write_text(public_key.read_text())
    lines = [
        f"ListenAddress {address}",
        f"Port {port}",
        f"HostKey {host_key}",
        f"AuthorizedKeysFile {authorized}",
        f"PidFile {directory}/sshd.pid",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin yes",
        "MaxStartups 100",
        f"SetEnv {' '.join([f'HOME={home}', *more])}",
    ]
    (directory / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    return [SSHD, "-D", "-f", str(directory / "sshd_config"), "-E", str(directory / "sshd.log")]


def known_host(directory: Path, address: str, port: int) -> str:
    """Return the line of a known_hosts file for a server of `write_server`."""
    place = address if port == 22 else f"[{address}]:{port}"
    return f"{place} {(directory / 'host_key.pub').read_text()}"


@dataclass
class Server:
    """A server on loopback, and the client's configuration that leads to it as `here`."""

    directory: Path
    port: int
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.directory / "config"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def words(self) -> list[str]:
        return ["ssh", "-F", str(self.config), "here"]

    @property
    def home(self) -> Path:
        return self.directory / "home"

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_for_port("127.0.0.1", self.port)

    def sessions(self) -> list[int]:
        """Return the processes that serve connections, with what they started."""
        return _descendants(self.process.pid) if self.process is not None else []

    def stop(self, sessions: bool = True) -> None:
        """End the server and, as a network drop would, the sessions of it."""
        if self.process is None:
            return
        if sessions:
            for pid in self.sessions():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process = None


@contextlib.contextmanager
def server(directory: Path) -> Iterator[Server]:
    """A running server below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    key = make_key(directory / "key")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (directory / "home").mkdir()
    found = Server(
        directory, port, write_server(directory, key.with_suffix(".pub"), directory / "home", "127.0.0.1", port)
    )
    found.known_hosts.write_text(known_host(directory, "127.0.0.1", port))
    write_client(found.config, {"here": f"127.0.0.1:{port}"}, key, found.known_hosts)
    found.start()
    try:
        yield found
    finally:
        found.stop()


def write_client(path: Path, hosts: dict[str, str], key: Path, known_hosts: Path, more: Sequence[str] = ()) -> None:
    """Write an SSH client's configuration: names to ADDRESS:PORT."""
    lines = []
    for name, place in hosts.items():
        address, _, port = place.rpartition(":")
        lines += [f"Host {name}", f"  HostName {address}", f"  Port {port}"]
    lines += [
        "Host *",
        f"  User {getpass.getuser()}",
        f"  IdentityFile {key}",
        "  IdentitiesOnly yes",
        "  IdentityAgent none",
    ]
    lines += [
        f"  UserKnownHostsFile {known_hosts}",
        "  GlobalKnownHostsFile /dev/null",
        *(f"  {line}" for line in more),
    ]
    path.write_text("\n".join(lines) + "\n")


def wait_for_port(address: str, port: int, seconds: float = 10, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a server accepts connections. If `process`, which is to start it, exits first, fail at once."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return True
        assert process is None or process.poll() is None, f"the server of {address}:{port} has exited"
        return False

    wait_for(listens, seconds, f"nothing listens on {address}:{port}")


def _descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()[1:]]
    found = [str(pid)]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return [int(one) for one in found[1:]]
