"""A port that ssh forwards from this machine to another one, for `Shell.tunnel`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from launcher.errors import HostError

RECONNECT_SECONDS = 0.5


def ssh_environment() -> dict[str, str]:
    """Return the environment of ssh: without a program that asks for a password in a window."""
    return {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}


class Tunnel:
    """A forwarded port, and the thread that reconnects it.

    Args:
        words: the ssh command, whose remote command prints `READY` first.
        local: the local port.
        failed: returns the error for the output of ssh.
        connect_seconds: the time limit of ssh for a connection.
    """

    READY = "launch-tunnel-is-ready"

    def __init__(
        self, words: Sequence[str], local: int, failed: Callable[[str], HostError], connect_seconds: float
    ) -> None:
        self._words, self._local, self._failed, self._connect_seconds = words, local, failed, connect_seconds
        self._closing = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, name="launch-tunnel", daemon=True)

    def open(self) -> None:
        self._start()
        latest = time.monotonic() + 2 * self._connect_seconds
        try:
            assert self._process is not None
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
            printed = b""
            while self.READY.encode() not in printed or not self._listens():
                printed += self._process.stdout.read() or b""
                ended = self._process.poll() is not None
                output = self._output() if ended else ""
                if ended:
                    raise self._failed(output)
                if time.monotonic() > latest:
                    raise self._failed("timed out")
                time.sleep(0.02)
            if f"cannot listen to port: {self._local}" in self._output():
                raise self._failed(f"the local port {self._local} is in use")
        except BaseException:
            self.close()
            raise
        self._keeper.start()

    def close(self) -> None:
        self._closing.set()
        self._end()
        if self._keeper.ident is not None:
            self._keeper.join()
            self._end()  # the thread may have started another process
        self._errors.close()

    def _output(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=ssh_environment(),
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._local), timeout=1):
            return True
        return False

    def _keep(self) -> None:
        assert self._process is not None
        while not self._closing.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(RECONNECT_SECONDS)
                self._closing.wait(RECONNECT_SECONDS)
                if not self._closing.is_set():
                    self._end()
                    self._start()
