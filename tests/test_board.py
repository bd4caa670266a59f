"""`launch board` responds to the user's browser, and rejects requests of pages of other sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from launcher.cli.board import page, pinned_tags
from launcher.cli.board_server import is_known
from tests.support.stores import free_port
from tests.support.waiting import wait_for


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

            def answers() -> bool:
                assert server.poll() is None, (root / "output").read_text()
                return status(f"http://127.0.0.1:{port}/") is not None

            wait_for(answers, 60)
            text = (root / "output").read_text()
            yield next(word for word in text.split() if word.startswith("http://")).partition("?")[0]
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


def run(root: Path, name: str, result: dict[str, Any], monitor: object = "val/loss") -> None:
    (root / name).mkdir()
    (root / name / "result.json").write_text(json.dumps(result))
    (root / name / "config.yaml").write_text(json.dumps({"checkpoint": {"monitor": monitor}}))


def test_the_losses_and_the_monitored_tags_are_pinned(tmp_path: Path) -> None:
    """Would be wrong: a run without an evaluation that is left out, or a damaged run that ends the command."""
    assert pinned_tags(tmp_path) == ["train/loss", "val/loss"]
    run(tmp_path, "evaluated", {"best": {"tag": "val/accuracy", "value": 0.5, "step": 3}})
    run(tmp_path, "started", {"best": None}, monitor="val/f1")
    run(tmp_path, "without", {}, monitor=None)
    run(tmp_path, "damaged", {})
    (tmp_path / "damaged/config.yaml").write_text("{")
    (tmp_path / "damaged/result.json").write_text("{}")
    assert sorted(pinned_tags(tmp_path)) == ["train/loss", "val/accuracy", "val/f1", "val/loss"]
    cards = json.loads(parse_qs(urlsplit(page(["val/a&b"])).query)["pinnedCards"][0])
    assert cards == [{"plugin": "scalars", "tag": "val/a&b"}]
