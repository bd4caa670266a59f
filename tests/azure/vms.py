"""VMs for the fake of Azure: network namespaces with an SSH server each, and one for the user's laptop.

    with Vms(3) as lab:
        lab.launch("up", "cluster=azure", …)       # on the laptop, as a user does
        lab.azure.evict(name)                      # the machine disappears without a notice

A VM that the fake creates is assigned the next free machine, whose user `ubuntu` accepts the SSH key of the template. A
deleted VM loses all processes and its disk. The API and its proxy listen on the laptop.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher.clusters.azure.spec import DIRECTORY, USER
from launcher.clusters.pricing import catalogue
from tests.azure.fake import Fake, nic_of
from tests.support.command import Result
from tests.support.servers import HttpServer
from tests.support.vmlab import lab
from tests.support.vmlab.lab import ROOT, Host, Lab
from tests.support.waiting import limit

SSHD = "/usr/sbin/sshd"
_CLONE_NEWNET = 0x40000000
NOTICE_SECONDS = 30.0  # before a simulated eviction


def why_not() -> str:
    """Return why this machine cannot run such VMs; empty if it can."""
    missing = [name for name in (SSHD, "rsync", "ssh-keygen", "openssl") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install openssh-server, rsync and openssl"
    return lab.why_not()


class Vms(Lab):
    """Machines for VMs, and one more for the laptop."""

    apart = True

    def __init__(self, machines: int) -> None:
        super().__init__(machines + 1)
        self.free: list[Host] = []
        self.used: dict[str, Host] = {}  # by the id of the VM
        self.answers = True  # whether a new VM has an SSH server

    def __enter__(self) -> Vms:
        super().__enter__()
        try:
            self.free = list(self.hosts[:-1])
            self.azure = Fake(self.directory / "azure", listen=self.laptop.address, seconds=0.5)
            self.azure.server = self._server
            self.azure.vm_created, self.azure.vm_deleted = self._created, self._deleted
            self.azure.simulated = self._evict_with_notice
            self.azure.sizes = {name: list("12") for name in (*catalogue.sizes(), *catalogue.heads())}
            self._cleanup.enter_context(self.azure)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    @property
    def laptop(self) -> Host:
        return self.hosts[-1]

    def host(self, name: str) -> Host:
        """Return the machine of a VM by a part of its name."""
        return next(host for vm, host in self.used.items() if name in vm.rpartition("/")[2])

    def environment(self) -> dict[str, str]:
        """Return the environment of the user on the laptop: separate directories, and no variables of Ray."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_", "LAUNCH_"))
        }
        home = self.directory / self.laptop.name
        own = {
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "XDG_RUNTIME_DIR": str(self.directory),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "AUTOSCALER_NODE_START_WAIT_S": "90",
        }
        return {**inherited, **self.azure.environment, **own}

    @property
    def state(self) -> Path:
        """Return the directory on the laptop with launch's records of clusters."""
        return self.directory / self.laptop.name / "state" / "launch" / "clusters"

    def launch(self, *words: str, seconds: float = 280, **env: str) -> Result:
        """Run `launch` on the laptop and wait for its end."""
        done = subprocess.run(
            self.laptop.command([sys.executable, "-m", "launcher", *words]),
            env={**self.environment(), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit(seconds),
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def _server(self, handler: Any) -> HttpServer:
        """Return a server that listens on the laptop. A socket belongs to the namespace in which it was created."""
        servers: list[HttpServer] = []

        def make() -> None:
            with open(f"/var/run/netns/{self.laptop._link.name}") as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.setns(namespace.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            servers.append(HttpServer((self.laptop.address, 0), handler))

        thread = threading.Thread(target=make)  # setns() affects only the calling thread
        thread.start()
        thread.join()
        return servers[0]

    def announce(self, name: str, seconds: float) -> None:
        """Announce the eviction of a VM in its Scheduled Events."""
        host = self.host(name)
        before = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))
        event = {"EventId": "1", "EventType": "Preempt", "EventStatus": "Scheduled", "NotBefore": before}
        (self.disk(host) / "etc/events").write_text(
            json.dumps({"DocumentIncarnation": 2, "Events": [{**event, "Resources": [name]}]})
        )

    def _evict_with_notice(self, name: str) -> None:
        self.announce(name, NOTICE_SECONDS)

        def evict() -> None:
            with contextlib.suppress(StopIteration):  # it was already deleted
                self.azure.evict(name)

        timer = threading.Timer(NOTICE_SECONDS, evict)
        timer.daemon = True
        timer.start()
        self._cleanup.callback(timer.cancel)

    # ---- creation and deletion of VMs -------------------------------------------------------------------------------

    def _created(self, vm: dict[str, Any]) -> None:
        latest = time.monotonic() + 120
        while not self.free and time.monotonic() < latest:  # a machine may be about to become free
            time.sleep(0.1)
        host = self.free.pop(0)
        self.used[vm["id"]] = host
        inside = nic_of(self.azure, vm)["properties"]["ipConfigurations"][0]["properties"]
        inside["privateIPAddress"] = host.address
        if "publicIPAddress" in inside:
            self.azure.resources[inside["publicIPAddress"]["id"].lower()]["properties"]["ipAddress"] = host.address
        if self.answers:
            self._boot(host, vm)

    def _deleted(self, vm: dict[str, Any]) -> None:
        host = self.used.pop(vm["id"])
        host.kill()
        host.run(["sh", "-c", "umount -l /home/ubuntu /home /tmp/ray /etc/passwd"])
        shutil.rmtree(self.disk(host), ignore_errors=True)
        self.free.append(host)

    def disk(self, host: Host) -> Path:
        return self.directory / f"disk-{host.name}"

    def _boot(self, host: Host, vm: dict[str, Any]) -> None:
        disk = self.disk(host)
        home, etc = disk / "home", disk / "etc"
        for path in (home / ".ssh", home / "launch", etc):
            path.mkdir(parents=True)
        # The image already contains the environment that `launch up` would create.
        (home / "launch" / "env").symlink_to(sys.prefix)
        key = vm["properties"]["osProfile"]["linuxConfiguration"]["ssh"]["publicKeys"][0]["keyData"]
        (etc / "authorized_keys").write_text(key)
        (etc / "passwd").write_text(f"{USER}:x:0:0::/home/{USER}:/bin/bash\n{Path('/etc/passwd').read_text()}")
        environment = {
            **self.azure.environment,
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "80000000",
            "OMP_NUM_THREADS": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        del environment["PATH"]  # a VM has no `az`: it gets tokens from its metadata service
        (etc / "token").write_text(self.azure.token_of(vm))
        (etc / "events").write_text(json.dumps({"DocumentIncarnation": 1, "Events": []}))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "host_key")], check=True)
        lines = [
            f"ListenAddress {host.address}",
            f"HostKey {etc}/host_key",
            f"AuthorizedKeysFile {etc}/authorized_keys",
            f"PidFile {etc}/sshd.pid",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "PermitRootLogin yes",
            "MaxStartups 100",
            "SetEnv " + " ".join(f"{name}={value}" for name, value in environment.items()),
        ]
        (etc / "sshd_config").write_text("\n".join(lines) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        mounts = (
            f"hostname {vm['name']} && mount -t tmpfs tmpfs /home && mkdir /home/{USER} "
            f"&& mount --bind {home} /home/{USER} && mount --bind {etc}/passwd /etc/passwd "
            "&& mkdir -p /tmp/ray && mount -t tmpfs -o size=1g tmpfs /tmp/ray "
            "&& ip address replace 169.254.169.254/32 dev lo"
        )
        done = host.run(["sh", "-c", mounts])
        assert done.returncode == 0, done.stderr
        service = [sys.executable, "-I", "-S", str(ROOT / "tests/azure/imds.py"), vm["name"]]
        host.start([*service, str(etc / "token"), str(etc / "events")], env={"RAY_AUTH_TOKEN": ""})
        host.start([SSHD, "-D", "-f", str(etc / "sshd_config"), "-E", str(etc / "sshd.log")], env={"HOME": "/root"})


def log(lab: Vms, name: str) -> str:
    """Return the end of a log file of launch on the head."""
    with contextlib.suppress(StopIteration, OSError):
        return (lab.disk(lab.host("head")) / "home" / Path(DIRECTORY).name / name).read_text()[-3000:]
    return ""


def reachable(address: str, port: int, host: Host) -> bool:
    """Return whether a machine can connect to an address and port."""
    code = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
    return host.run([sys.executable, "-I", "-S", "-c", code]).returncode == 0
