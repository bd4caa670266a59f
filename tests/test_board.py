"""`launch board` responds to the user's browser, and rejects requests of pages of other sites."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.board_server import is_known
from tests.support.stores import free_port


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:6006", True),
        ("[::1]:6006", True),
        ("localhost:6006", True),
        ("localhost.", True),
        ("node-1:6006", True),
        ("NODE-1", True),
        ("evil.example:6006", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_accepted_host_names(host: str, known: bool) -> None:
    assert is_known(host, {"node-1"}) is known


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root, port = tmp_path_factory.mktemp("runs"), free_port()
    (root / "tensorboard").mkdir()  # the calling directory replaces no module
    (root / "tensorboard" / "__init__.py").write_text("raise SystemExit('shadowed')")
    command = [sys.executable, "-m", "launcher", "board", f"run.root={root}", "--port", str(port)]
    with (root / "output").open("w+") as output:
        server = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, env=_with_launcher())
        try:
            end = time.monotonic() + 240
            while status(f"http://127.0.0.1:{port}/") is None:
                assert server.poll() is None, (root / "output").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
            text = (root / "output").read_text()
            yield next(word for word in text.split() if word.startswith("http://"))
        finally:
            server.terminate()
            server.wait(timeout=240)


def _with_launcher() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def status(address: str, host: str | None = None) -> int | None:
    """Return the status of the response; None if no server listens."""
    try:
        request = urllib.request.Request(address, headers={"Host": host} if host else {})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_the_address_has_a_secret_path(url: str) -> None:
    root = "/".join(url.split("/")[:3])
    assert len(url) - len(root) > 20
    assert status(f"{url}data/environment") == 200
    assert status(f"{root}/data/environment") == 404


def test_a_host_name_rebound_to_loopback_is_rejected(url: str) -> None:
    assert status(f"{url}data/environment", "localhost") == 200
    assert status(f"{url}data/environment", "evil.example") == 403
