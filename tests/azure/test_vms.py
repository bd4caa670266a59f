"""Clusters of VMs that answer: the whole of `ray up`, Ray's autoscaler on the head, and the fake of Azure beneath.

Most take minutes: `make slow`.
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

pytestmark = pytest.mark.timeout(600)
SIZE = "Standard_NC4as_T4_v3"
WORDS = ["cluster=azure", "cluster.name=demo", f"cluster.size={SIZE}", "cluster.ssh_from=10.77.0.0/24"]
CAPACITY = ("SkuNotAvailable", "The requested size is currently not available in eastus.")


@pytest.fixture
def there(request: pytest.FixtureRequest) -> Iterator[Vms]:
    if problem := vms.why_not():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    with Vms(getattr(request, "param", 3)) as lab:
        yield lab


def await_(what: Callable[[], bool], seconds: float, there: Vms) -> None:
    latest = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < latest, f"{sorted(there.used)}\n{vms.log(there, 'watchdog.log')}"
        time.sleep(1)


def names(there: Vms, part: str) -> list[str]:
    return sorted(vm.rpartition("/")[2] for vm in there.used if part in vm.rpartition("/")[2])


@pytest.mark.slow
def test_a_cluster_comes_trains_shrinks_and_goes(there: Vms) -> None:
    """Spot is preferred and there is none, so the nodes come on demand; idle they go, and `down` leaves nothing."""
    there.azure.refuse[SIZE, True] = CAPACITY
    words = [*WORDS, "cluster.nodes=2", "cluster.spot=prefer", "cluster.idle_minutes=1.5"]
    done = there.launch("up", *words)
    assert done.status == 0, done.err
    machines = [vm["properties"] for vm in there.azure.of_type("microsoft.compute/virtualmachines")]
    assert sorted(vm["priority"] for vm in machines) == ["Regular"] * 3
    # A second time nothing is made.
    made = len([one for one in there.azure.requests if one.startswith("PUT")])
    begun = time.monotonic()
    assert there.launch("up", *words).status == 0
    took = time.monotonic() - begun
    assert len([one for one in there.azure.requests if one.startswith("PUT")]) == made
    assert took < 30, f"{took:.0f} s"
    (told,) = json.loads(there.launch("status", "demo", "--json").out)
    assert told["usd_per_hour"] == pytest.approx(0.192 + 2 * 0.526)
    assert "ubuntu@10.77.0." in told["ssh"]
    assert [host["state"] for host in told["hosts"]] == ["running"] * 3
    assert any("SkuNotAvailable" in note for note in told["notes"])
    no_secret(there)
    no_rights(there)
    train(there, words)
    evict(there, names(there, "worker")[0])
    await_(lambda: len(names(there, "worker")) == 0, 200, there)
    done = there.launch("down", "demo")
    assert done.status == 0, done.err
    assert there.azure.left("launch-demo") == []
    assert [host.processes() for host in there.hosts[:-1]] == [{}] * 3
    assert there.launch("down", "demo").status == 2  # none is known any more


def evict(there: Vms, name: str) -> None:
    """Azure says it on the VM, the agent there tells the cluster, and then the VM is gone."""
    there.announce(name, seconds=30)
    notice = there.disk(there.host(name)) / "home/launch/eviction.log"
    await_(lambda: f"Preempt of {name}" in notice.read_text(), 20, there)
    there.azure.evict(name)


def no_rights(there: Vms) -> None:
    """What runs on a worker cannot change the cluster; what runs on the head can, and nothing outside its group."""
    group = f"subscriptions/{SUBSCRIPTION}/resourceGroups/launch-demo/resources"
    code = (
        "import json, sys, urllib.request as u; "
        "ask = lambda url, **more: u.urlopen(u.Request(url, headers=more), timeout=9).read(); "
        "token = json.loads(ask('http://169.254.169.254/metadata/identity/oauth2/token', Metadata='true')); "
        "ask('https://management.azure.com/' + sys.argv[1], Authorization='Bearer ' + token['access_token'])"
    )
    proxy = {
        "HTTPS_PROXY": there.azure.environment["HTTPS_PROXY"],
        "SSL_CERT_FILE": there.azure.environment["REQUESTS_CA_BUNDLE"],
    }
    for name, path, answer in (
        ("worker", group, "HTTP Error 403"),
        ("head", group, ""),
        ("head", f"subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute/skus", "HTTP Error 403"),
    ):
        told = there.host(name).run([sys.executable, "-c", code, path], env=proxy).stderr
        assert answer in told if answer else not told, (name, path, told)


def no_secret(there: Vms) -> None:
    """Ray's token and Azure's are in no file of the laptop, and on no command line."""
    head = there.host("head")
    token = (there.disk(head) / "home/.ray/auth_token").read_text().strip()
    assert len(token) == 64
    worker = there.host("worker")
    assert (there.disk(worker) / "home/.ray/auth_token").read_text().strip() == token
    for secret in (token, there.azure.token):
        for file in there.state.rglob("*"):
            assert file.is_dir() or secret not in file.read_text(errors="replace"), file
        for host in there.hosts:
            assert not host.find(secret)
    key = there.state / "demo.key"
    assert key.stat().st_mode & 0o077 == 0
    # The dashboard is for the head alone.
    assert vms.reachable(head.address, 22, there.laptop)
    assert not vms.reachable(head.address, 8265, there.laptop)
    assert [host.find("launcher.clusters.eviction") != [] for host in (head, worker)] == [True, True]


def train(there: Vms, words: list[str]) -> None:
    """From the laptop: two workers, one a VM; the head drives them, and the run's files come back."""
    asked = ["scaling.workers=2", "scaling.device=cpu", "scaling.cpus_per_worker=3", "run.name=far"]
    done = there.launch("train", "experiment=mnist_tiny", *words, *asked)
    assert done.status == 0, done.err[-3000:]
    result = json.loads((Path(done.last) / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["cost_usd"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("there", [1], indirect=True)
def test_a_head_that_never_answers(there: Vms) -> None:
    there.answers = False
    done = there.launch("up", *WORDS, AUTOSCALER_NODE_START_WAIT_S="15")
    assert done.status == 1
    assert "`ray up` of demo failed" in done.err
    assert there.azure.left("launch-demo") == []


@pytest.mark.slow
@pytest.mark.parametrize("there", [2], indirect=True)
def test_nodes_that_never_come(there: Vms) -> None:
    """After cluster.launch_attempts it is given up, with Azure's own words, and the head goes as well."""
    there.azure.refuse[SIZE, True] = CAPACITY
    done = there.launch("up", *WORDS, "cluster.spot=true", "cluster.launch_attempts=2")
    assert done.status == 1
    assert "in 2 attempts. SkuNotAvailable: The requested size is currently not available" in done.err
    assert there.azure.left("launch-demo") == []


@pytest.mark.parametrize("there", [1], indirect=True)
def test_the_cluster_ends_itself(there: Vms) -> None:
    """cluster.down_after: nobody's laptop is needed for it."""
    words = ["cluster.min_nodes=0", "cluster.idle_minutes=0.1", "cluster.down_after=true"]
    done = there.launch("up", *WORDS, *words)
    assert done.status == 0, done.err
    await_(lambda: there.azure.left("launch-demo") == [], 120, there)


@pytest.mark.slow
@pytest.mark.parametrize("there", [2], indirect=True)
def test_a_run_brings_its_nodes(there: Vms) -> None:
    """cluster.min_nodes=0: no GPU VM stands before the run asks, `auto` finds one, and afterwards all of it goes."""
    words = ["cluster.min_nodes=0", "cluster.idle_minutes=0.5", "cluster.down_after=true", "scaling.device=cpu"]
    done = there.launch("train", "experiment=mnist_tiny", *WORDS, *words, "run.name=far")
    assert done.status == 0, done.err[-3000:]
    result = json.loads((Path(done.last) / "result.json").read_text())
    assert (result["status"], result["workers"]) == ("completed", 2)
    await_(lambda: there.azure.left("launch-demo") == [], 200, there)
