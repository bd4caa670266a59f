"""Clusters of VMs that answer: `ray up`, Ray's autoscaler on the head, and the fake of Azure.

Most of these tests take minutes; run them with `make slow`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.azure import vms
from tests.azure.fake import SUBSCRIPTION
from tests.azure.vms import Vms
from tests.support.waiting import wait_for

SIZE = "Standard_NC4as_T4_v3"
WORDS = ["cluster=azure", "cluster.name=demo", f"cluster.size={SIZE}", "cluster.ssh_from=10.77.0.0/24"]
CAPACITY = ("SkuNotAvailable", "The requested size is currently not available in eastus.")


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Vms]:
    if problem := vms.why_not():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    with Vms(getattr(request, "param", 3)) as running:
        yield running


def await_(condition: Callable[[], bool], seconds: float, lab: Vms) -> None:
    wait_for(condition, seconds, lambda: f"{sorted(lab.used)}\n{vms.log(lab, 'watchdog.log')}")


def names(lab: Vms, part: str) -> list[str]:
    return sorted(vm.rpartition("/")[2] for vm in lab.used if part in vm.rpartition("/")[2])


@pytest.mark.slow
def test_a_cluster_is_created_trains_shrinks_and_is_removed(lab: Vms) -> None:
    """Without spot capacity the nodes are created on demand. Idle nodes are deleted, and `down` leaves nothing."""
    lab.azure.refuse[SIZE, True] = CAPACITY
    words = [*WORDS, "cluster.nodes=2", "cluster.spot=prefer", "cluster.idle_minutes=1.5"]
    done = lab.launch("up", *words)
    assert done.status == 0, done.err
    machines = [vm["properties"] for vm in lab.azure.of_type("microsoft.compute/virtualmachines")]
    assert sorted(vm["priority"] for vm in machines) == ["Regular"] * 3
    # A second `up` creates nothing.
    requests = len([one for one in lab.azure.requests if one.startswith("PUT")])
    started = time.monotonic()
    assert lab.launch("up", *words).status == 0
    took = time.monotonic() - started
    assert len([one for one in lab.azure.requests if one.startswith("PUT")]) == requests
    assert took < 30, f"{took:.0f} s"
    (shown,) = json.loads(lab.launch("status", "demo", "--json").out)
    assert shown["usd_per_hour"] == pytest.approx(0.192 + 2 * 0.526)
    assert "ubuntu@10.77.0." in shown["ssh"]
    assert [host["state"] for host in shown["hosts"]] == ["running"] * 3
    assert any("SkuNotAvailable" in note for note in shown["notes"])
    no_secret(lab)
    no_rights(lab)
    train(lab, words)
    evict(lab, names(lab, "worker")[0])
    await_(lambda: len(names(lab, "worker")) == 0, 200, lab)
    done = lab.launch("down", "demo")
    assert done.status == 0, done.err
    assert lab.azure.remaining("launch-demo") == []
    assert [host.processes() for host in lab.hosts[:-1]] == [{}] * 3
    assert lab.launch("down", "demo").status == 2  # the record no longer exists


def evict(lab: Vms, name: str) -> None:
    """Announce the eviction on the VM, wait until its agent has seen it, and evict the VM."""
    lab.announce(name, seconds=30)
    notice = lab.disk(lab.host(name)) / "home/launch/eviction.log"
    await_(lambda: f"Preempt of {name}" in notice.read_text(), 20, lab)
    lab.azure.evict(name)


def no_rights(lab: Vms) -> None:
    """Processes on a worker cannot change the cluster. Those on the head can, but nothing outside its group."""
    group = f"subscriptions/{SUBSCRIPTION}/resourceGroups/launch-demo/resources"
    code = (
        "import json, sys, urllib.request as u; "
        "ask = lambda url, **more: u.urlopen(u.Request(url, headers=more), timeout=9).read(); "
        "token = json.loads(ask('http://169.254.169.254/metadata/identity/oauth2/token', Metadata='true')); "
        "ask('https://management.azure.com/' + sys.argv[1], Authorization='Bearer ' + token['access_token'])"
    )
    proxy = {
        "HTTPS_PROXY": lab.azure.environment["HTTPS_PROXY"],
        "SSL_CERT_FILE": lab.azure.environment["REQUESTS_CA_BUNDLE"],
    }
    for name, path, error in (
        ("worker", group, "HTTP Error 403"),
        ("head", group, ""),
        ("head", f"subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute/skus", "HTTP Error 403"),
    ):
        output = lab.host(name).run([sys.executable, "-c", code, path], env=proxy).stderr
        assert error in output if error else not output, (name, path, output)


def no_secret(lab: Vms) -> None:
    """Ray's token and Azure's are not in any file of the laptop, and not on any command line."""
    head = lab.host("head")
    token = (lab.disk(head) / "home/.ray/auth_token").read_text().strip()
    assert len(token) == 64
    worker = lab.host("worker")
    assert (lab.disk(worker) / "home/.ray/auth_token").read_text().strip() == token
    for secret in (token, lab.azure.token):
        for file in lab.state.rglob("*"):
            assert file.is_dir() or secret not in file.read_text(errors="replace"), file
        for host in lab.hosts:
            assert not host.find(secret)
    key = lab.state / "demo.key"
    assert key.stat().st_mode & 0o077 == 0
    # The dashboard is reachable only from the head.
    assert vms.reachable(head.address, 22, lab.laptop)
    assert not vms.reachable(head.address, 8265, lab.laptop)
    assert [host.find("launcher.clusters.eviction") != [] for host in (head, worker)] == [True, True]


def train(lab: Vms, words: list[str]) -> None:
    """Train from the laptop with one worker per VM. The head drives the run, and its files are copied back."""
    options = ["scaling.workers=2", "scaling.device=cpu", "scaling.cpus_per_worker=3", "run.name=far"]
    done = lab.launch("train", "experiment=mnist_tiny", *words, *options)
    assert done.status == 0, done.err[-3000:]
    result = json.loads((Path(done.last) / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["cost_usd"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lab", [1], indirect=True)
def test_an_unreachable_head(lab: Vms) -> None:
    lab.answers = False
    done = lab.launch("up", *WORDS, AUTOSCALER_NODE_START_WAIT_S="15")
    assert done.status == 1
    assert "`ray up` of demo failed" in done.err
    assert lab.azure.remaining("launch-demo") == []


@pytest.mark.slow
@pytest.mark.parametrize("lab", [2], indirect=True)
def test_nodes_without_capacity(lab: Vms) -> None:
    """After cluster.launch_attempts failures, `up` fails with Azure's error, and the head is removed as well."""
    lab.azure.refuse[SIZE, True] = CAPACITY
    done = lab.launch("up", *WORDS, "cluster.spot=true", "cluster.launch_attempts=2")
    assert done.status == 1
    assert "SkuNotAvailable: The requested size is currently not available" in done.err
    assert lab.azure.remaining("launch-demo") == []


@pytest.mark.parametrize("lab", [1], indirect=True)
def test_an_idle_cluster_removes_itself(lab: Vms) -> None:
    """cluster.down_after works without the laptop."""
    words = ["cluster.min_nodes=0", "cluster.idle_minutes=0.1", "cluster.down_after=true"]
    done = lab.launch("up", *WORDS, *words)
    assert done.status == 0, done.err
    await_(lambda: lab.azure.remaining("launch-demo") == [], 120, lab)


@pytest.mark.slow
@pytest.mark.parametrize("lab", [2], indirect=True)
def test_a_run_creates_its_nodes(lab: Vms) -> None:
    """With cluster.min_nodes=0 no GPU VM exists before the run. `auto` gets one, and all is removed afterwards."""
    words = ["cluster.min_nodes=0", "cluster.idle_minutes=0.5", "cluster.down_after=true", "scaling.device=cpu"]
    done = lab.launch("train", "experiment=mnist_tiny", *WORDS, *words, "run.name=far")
    assert done.status == 0, done.err[-3000:]
    result = json.loads((Path(done.last) / "result.json").read_text())
    assert (result["status"], result["workers"]) == ("completed", 2)
    await_(lambda: lab.azure.remaining("launch-demo") == [], 200, lab)
