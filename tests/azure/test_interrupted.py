"""An interrupted `launch up`: the partial cluster is recorded, can be continued, and can be removed completely."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import machines
from launcher.clusters.azure import lifecycle
from launcher.clusters.remote import registry
from launcher.errors import MachineError
from tests.azure.fake import VM, Fake
from tests.azure.test_lifecycle import CLUSTER, ignore
from tests.support.vmlab.lab import ROOT

WORDS = ["cluster=azure", "cluster.name=demo", f"cluster.size={CLUSTER.size}", "cluster.ssh_from=203.0.113.7/32"]


def network_is_under_way(azure: Fake) -> bool:
    return any(one.startswith("PUT") and one.endswith("/deployments/launch-base") for one in azure.requests)


def ray_waits_for_the_head(azure: Fake) -> bool:
    return len(azure.of_type(VM)) == 1


@contextmanager
def coming_up(azure: Fake, until: Callable[[Fake], bool]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "launcher", "up", *WORDS]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        latest = time.monotonic() + 240
        while not until(azure):
            assert time.monotonic() < latest, azure.requests
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def on_loopback(azure: Fake) -> Callable[[dict[str, Any]], None]:
    """Give heads an address that refuses connections immediately, since an unused address would time out."""

    def created(vm: dict[str, Any]) -> None:
        for one in azure.of_type("microsoft.network/publicipaddresses"):
            one["properties"]["ipAddress"] = "127.0.0.9"

    return created


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # the process has exited
            continue
    return found


@pytest.mark.parametrize(
    ("until", "number", "status"),
    [(network_is_under_way, signal.SIGINT, 130), (ray_waits_for_the_head, signal.SIGTERM, 143)],
)
def test_an_interrupted_up(
    azure: Fake,
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[[Fake], bool],
    number: signal.Signals,
    status: int,
) -> None:
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("AUTOSCALER_NODE_START_WAIT_S", "2")
    azure.vm_created = on_loopback(azure)
    azure.seconds = 3.0 if until is network_is_under_way else 0.0
    with coming_up(azure, until) as process:
        assert not [line for line in command_lines() if azure.token in line]
        process.send_signal(number)
        output = process.communicate(timeout=240)[1]
    azure.seconds = 0.0
    assert process.returncode == status, output
    assert "launch down demo" in output
    place = registry.directory()
    assert not [line for line in command_lines() if str(place / "demo.yaml") in line], "`ray up` still runs"
    assert azure.token not in output + "".join(file.read_text() for file in place.iterdir())
    (known,) = machines.status()
    assert (known["name"], len(known["hosts"])) == ("demo", 1)
    # A second call continues with the existing resources, and does not remove them if it fails.
    vms = len(azure.of_type(VM))
    azure.refuse["Standard_D4s_v5", False] = ("InvalidParameter", "The value of imageReference is invalid.")
    with pytest.raises(MachineError, match="`ray up` of demo failed" if vms else "InvalidParameter"):
        lifecycle.up(CLUSTER, ignore)
    assert len(azure.of_type(VM)) == vms
    assert azure.remaining("launch-demo") != []
    machines.down("demo", ignore, lambda head: None)
    assert azure.remaining("launch-demo") == []
    assert list(place.iterdir()) == []
    assert machines.status() == []
