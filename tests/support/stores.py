"""Object stores for tests: the Azurite emulator, a proxy that fails requests on purpose, and a client of its own."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from tests.support.servers import wait_for_port

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

AZURITE = "3.37.0"  # npm package, installed beside the packages of Python
ACCOUNT = "devstoreaccount1"
# Published with the emulator, the same everywhere.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def install_azurite() -> Path:
    """Return the folder of the pinned Azurite, installed with npm if need be. RuntimeError where that cannot be."""
    target = Path(sys.prefix) / "npm" / f"azurite-{AZURITE}"
    if target.is_dir():
        return target
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise RuntimeError("no npm found, which installs the Azurite emulator; on Debian: apt-get install npm")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix", folder]
        # Node brings its own list of authorities; the machine's own count as well, as they do for pip.
        authorities = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        done = subprocess.run(
            ["npm", "install", *options, f"azurite@{AZURITE}"],
            env={"NODE_EXTRA_CA_CERTS": authorities, **os.environ},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if done.returncode:
            raise RuntimeError(f"npm could not install azurite {AZURITE}: {done.stderr.strip()[-500:]}")
        with contextlib.suppress(OSError):  # another process of the tests was quicker
            os.rename(folder, target)
            Path(folder).mkdir()  # for the context, which removes it
    return target


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def azurite() -> Iterator[str]:
    """Run the emulator on a free port of loopback, all in memory; yields host:port."""
    program = install_azurite() / "node_modules" / ".bin" / "azurite-blob"
    port = free_port()
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["node", str(program), *options, "--blobPort", str(port)],
            stdout=output,
            stderr=output,
            cwd=tempfile.gettempdir(),
        )
        try:
            try:
                wait_for_port("127.0.0.1", port, 40, process)
            except AssertionError as error:
                output.seek(0)
                text = output.read().decode(errors="replace")[-500:]
                raise RuntimeError(f"Azurite did not start: {text}") from error
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=240)


@dataclass
class Container:
    """A container of the emulator, seen by a client that shares nothing with the code under test."""

    authority: str
    name: str

    @property
    def uri(self) -> str:
        return f"abfss://{self.name}@{ACCOUNT}.dfs.core.windows.net/runs"

    def environment(self, cache: Path, authority: str | None = None) -> dict[str, str]:
        """Return what a process needs to reach it, on a machine whose copies lie in `cache`."""
        return {
            "AZURE_STORAGE_KEY": KEY,
            "LAUNCH_AZURE_BLOB_AUTHORITY": authority or self.authority,
            "LAUNCH_AZURE_SCHEME": "http",
            "XDG_CACHE_HOME": str(cache),
        }

    @property
    def client(self) -> FileSystem:
        from pyarrow import fs

        places = {f"{kind}_storage_authority": self.authority for kind in ("blob", "dfs")}
        schemes = {f"{kind}_storage_scheme": "http" for kind in ("blob", "dfs")}
        return fs.AzureFileSystem(ACCOUNT, account_key=KEY, **places, **schemes)

    def create(self) -> Container:
        self.client.create_dir(self.name)
        return self

    def names(self, below: str = "") -> set[str]:
        """Return the names of all files below a folder of the run root, relative to the root."""
        from pyarrow import fs

        start = f"{self.name}/runs/"
        selector = fs.FileSelector((start + below).rstrip("/"), recursive=True, allow_not_found=True)
        infos = self.client.get_file_info(selector)
        return {info.path.removeprefix(start) for info in infos if info.type == fs.FileType.File}

    def has_checkpoint(self, run: str) -> bool:
        """Return whether a checkpoint is complete. While a manifest is being written, the store shows an empty file."""
        from pyarrow import fs

        selector = fs.FileSelector(f"{self.name}/runs/{run}/checkpoints", recursive=True, allow_not_found=True)
        return any(one.base_name == "manifest.json" and one.size for one in self.client.get_file_info(selector))

    def read(self, name: str) -> bytes:
        with self.client.open_input_stream(f"{self.name}/runs/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        with self.client.open_output_stream(f"{self.name}/runs/{name}") as stream:
            stream.write(content)

    def result(self, run: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.read(f"{run}/result.json"))
        return content

    def intact(self, run: str) -> list[int]:
        """Return the steps that have a checkpoint. Asserts that each checkpoint matches its manifest."""
        steps = []
        for name in sorted(self.names(f"{run}/checkpoints")):
            folder, _, last = name.rpartition("/")
            if last != "manifest.json":
                continue
            listed = json.loads(self.read(name))["files"]
            there = {one.removeprefix(f"{folder}/") for one in self.names(folder)}
            assert there == {*listed, "manifest.json"}, f"{folder}: {there ^ {*listed, 'manifest.json'}}"
            for one, entry in listed.items():
                content = self.read(f"{folder}/{one}")
                assert len(content) == entry["size"], f"{folder}/{one}: {len(content)} bytes"
                assert xxhash.xxh3_128_hexdigest(content) == entry["xxh128"], f"{folder}/{one} differs"
            steps.append(int(folder.rpartition("-")[2]))
        return steps


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    """Host and port of Azurite. Without npm the test is skipped, but fails where CI is set."""
    try:
        with azurite() as authority:
            yield authority
    except RuntimeError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


_number = itertools.count()


@pytest.fixture
def container(emulator: str) -> Container:
    return Container(emulator, f"test{next(_number)}").create()


class FaultyProxy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Passes requests on to the emulator, and fails every `every`th: 500, 503, or a connection that is reset.

    `count` and `failed` count requests. `down` makes it refuse all.
    """

    daemon_threads = True

    def __init__(self, authority: str, every: int = 10) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.every = authority, every
        self.count = self.failed = 0
        self.down = False
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        """Return how the next request fails, if it does."""
        with self._lock:
            self.count += 1
            if self.down:
                return "503"
            if self.count % self.every:
                return None
            self.failed += 1
            return ("500", "503", "reset")[self.failed % 3]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client has gone


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
            return
        if fault is not None:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "keep-alive", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass

    def log_message(self, format: str, *args: Any) -> None:
        pass
