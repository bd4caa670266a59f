"""A Ray cluster on this machine that launch did not start, with its Jobs API on loopback, and a network that fails."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.stores import free_port
from tests.support.waiting import limit

ROOT = Path(__file__).resolve().parents[3]


class JobsCluster:
    """A cluster of one node with two CPUs and a token."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rj-", dir="/tmp"))  # short, since it contains Ray's sockets
        self.token = secrets.token_hex(32)
        self.url = f"http://127.0.0.1:{free_port()}"
        ports = [
            f"--{name}={free_port()}" for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port")
        ]
        words = ["start", "--head", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        words += [*ports, "--num-cpus=2", f"--temp-dir={self.directory}/t", "--object-store-memory=80000000"]
        words += ["--disable-usage-stats", "--block", "--node-ip-address=127.0.0.1", "--min-worker-port=0"]
        words += ["--max-worker-port=0"]
        self._log = (self.directory / "log").open("wb")
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def environment(self) -> dict[str, str]:
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "HOME": str(self.directory)}
        own |= {"RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return {**{key: value for key, value in os.environ.items() if key != "PLANTED"}, **own}

    def wait(self, seconds: float = 60) -> None:
        end = time.monotonic() + limit(seconds)
        request = urllib.request.Request(f"{self.url}/api/version", headers={"Authorization": f"Bearer {self.token}"})
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2):
                return
            log = (self.directory / "log").read_text(errors="replace")[-2000:]
            assert self.process.poll() is None, log
            assert time.monotonic() < end, log
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running() -> Iterator[JobsCluster]:
    cluster = JobsCluster()
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.close()


class Network:
    """A TCP proxy to a port. While it is cut, open connections are closed and new ones are not answered."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: list[socket.socket] = []
        self._cut = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut.set()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        self._cut.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            if self._cut.is_set():
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._to))
            self._open += [here, there]
            for pair in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                target.sendall(block)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
