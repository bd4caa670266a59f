"""Cluster kinds: the registry, the conformance suite, and a kind that another package registers."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.clusters.base import kinds, named
from launcher.clusters.conformance import Harness, Reference, check, check_requests, check_run, record
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.local.kind import LocalCluster
from launcher.clusters.ssh.kind import SshCluster
from launcher.config import compose
from launcher.config.schema import Job, cluster_schema, cluster_section
from launcher.errors import ConfigError
from tests.support.command import PROJECT, Place
from tests.support.vmlab.lab import Lab
from tests.support.vmlab.ssh_lab import SshLab, processes_left, temporary_files_left
from tests.support.waiting import wait_for

JOB = ("--config-dir", "own", "experiment=toy", "trainer.deterministic=true")
LONG = ("trainer.steps=1000000", "checkpoint.every=1000", "trainer.log_every=50")
FAILING = ("data.bad=15",)
KUBECTL = Path(__file__).with_name("kuberay")  # the folder of a fake
STORE = "abfss://runs@ada.dfs.core.windows.net/runs"


def harness(place: Path, words: list[str], bad: list[list[str]], **environment: str) -> Harness:
    home = {"HOME": str(place / "home"), **environment}
    return Harness(words, bad, place, JOB, LONG, FAILING, environment=home)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Run the job in one process, for comparison with the runs on all kinds."""
    directory = tmp_path_factory.mktemp("reference") / "project"
    shutil.copytree(PROJECT, directory)
    return record(harness(directory, ["cluster=none"], []))


@pytest.fixture
def toy(tmp_path: Path) -> str:
    """Install the toy kind as a separate package. Returns the directory for PYTHONPATH."""
    site = tmp_path / "site"
    facts = site / "toy_kind-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-kind\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[launch.clusters]\ntoy = toy_kind:KIND\n")
    shutil.copy(Path(__file__).with_name("toy_kind.py"), site)
    return str(site)


@dataclass(frozen=True)
class LabHarness(Harness):
    """Runs the commands on the head of a laboratory. Ray clients reach no Ray that listens only on 127.0.0.1."""

    lab: Lab = field(kw_only=True)

    def _call(self, words: Sequence[str]) -> dict[str, Any]:
        command = [sys.executable, "-m", "launcher", *words]
        head = self.lab.head
        return {"args": head.command(command, self.directory), "env": head.environment(self.environment)}


@dataclass(frozen=True)
class LaptopHarness(Harness):
    """Runs the commands on the laptop of a laboratory of SSH machines."""

    lab: SshLab = field(kw_only=True)

    def _call(self, words: Sequence[str]) -> dict[str, Any]:
        command = self.lab.laptop.command(self.lab.command(*words), self.directory)
        # Ctrl-C would end nsenter before launch, which sets its own handler.
        return {"args": ["env", "--ignore-signal=INT", *command], "env": self.lab.environment(self.environment)}


@dataclass(frozen=True)
class HereHarness(Harness):
    """Runs the commands in this process, for kinds of which only requests are tested."""

    here: Place = field(kw_only=True)

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = self.here.here(*words)
        return subprocess.CompletedProcess(words, done.status, done.out, done.err)


def left_on(lab: SshLab) -> list[str]:
    """Return what is left on the machines: of a run while the cluster is up, else of the cluster, too.

    The command that follows a run returns before the processes of the run have exited.
    """

    def found() -> list[str]:
        processes = [words for each in processes_left(lab).values() for words in each]
        if list(lab.own(lab.laptop).glob("state/launch/clusters/*.json")):
            return [
                words for words in processes if re.search(r"launcher\.driver|TrainController|RayTrainWorker", words)
            ]
        return [*processes, *map(str, temporary_files_left(lab).items())]

    with contextlib.suppress(AssertionError):
        wait_for(lambda: not found())
    return found()


@pytest.fixture(
    params=["none", "local", "toy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("existing", "ssh"))]
)
def kind(request: pytest.FixtureRequest, place: Place) -> Harness:
    """Return the harness of a kind that can train here."""
    if request.param == "ssh":
        machines: SshLab = request.getfixturevalue("ssh_machines")
        words = [*machines.words(), "scaling.workers=2", "scaling.cpus_per_worker=2"]
        left, bad = functools.partial(left_on, machines), [["cluster.hosts=[vm1,vm1]"], ["cluster.user=-o"]]
        return LaptopHarness(words, bad, machines.calling, JOB, LONG, FAILING, left=left, down="ssh", lab=machines)
    if request.param == "none":
        return harness(place.directory, ["cluster=none"], [["scaling.workers=2"], ["cluster.hosts=[a]"]])
    if request.param == "local":
        rejected = [["cluster.keep_minutes=-1"], ["cluster.hosts=[a]"]]
        return harness(place.directory, ["cluster=local", "scaling.workers=2"], rejected)
    if request.param == "toy":
        made: Harness = request.getfixturevalue("toy_harness")
        return made
    lab: Lab = request.getfixturevalue("cluster")
    words = ["cluster=existing", f"cluster.address={lab.address}", "scaling.workers=2"]
    rejected = [["cluster.address=nowhere"], [f"cluster.address={lab.head.address}:9"]]
    home = {"HOME": str(place.home)}
    return LabHarness(words, rejected, place.directory, JOB, LONG, FAILING, environment=home, lab=lab)


@pytest.fixture
def toy_harness(place: Place, toy: str) -> Harness:
    rejected = [["cluster.toy_cpus=0"], ["cluster.toy_cpu=1"]]
    return harness(place.directory, ["cluster.kind=toy", "scaling.workers=2"], rejected, PYTHONPATH=toy)


@pytest.fixture(params=["ssh", "azure", "kuberay"])
def distant_kind(request: pytest.FixtureRequest, here: Place, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """Return the harness of a kind whose machines do not exist: their hosts, Azure and the price list do not answer."""
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PATH", f"{KUBECTL}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(here.home))
    size, image = "cluster.size=NC24ads_A100_v4", "cluster.image=launch:1"
    words, bad = {
        "ssh": (["cluster.hosts=[ada@127.0.0.1:9]"], [["cluster.hosts=[a,a]"], ["cluster.python=python3"]]),
        "azure": ([size], [["cluster.size=NC24rs_v3"], ["cluster.min_nodes=3", "cluster.nodes=2"]]),
        "kuberay": ([size, image, f"run.root={STORE}"], [["cluster.namespace=My NS"], ["run.root=runs"]]),
    }[request.param]
    chosen = [f"cluster={request.param}", *words]

    def left() -> list[str]:
        return [path.name for path in here.home.glob("create.yaml")]

    return HereHarness(chosen, bad, here.directory, JOB, LONG, FAILING, left=left, here=here)


def test_a_kind_plans_and_rejects_bad_keys(kind: Harness) -> None:
    check_requests(kind)


def test_a_kind_of_other_machines_plans_and_rejects_bad_keys(distant_kind: Harness) -> None:
    check_requests(distant_kind)


@pytest.mark.slow
def test_a_kind_conforms(kind: Harness, reference: Reference) -> None:
    check(kind, reference)


def test_a_kind_from_another_package_trains(toy_harness: Harness, reference: Reference) -> None:
    """A new kind needs no change to launch."""
    check_run(toy_harness, reference)


@pytest.mark.slow
def test_a_kind_from_another_package_sweeps(toy_harness: Harness) -> None:
    swept = toy_harness.launch("-m", *JOB, *toy_harness.words, "run.name=swept", "optimizer.lr=0.1,0.2")
    assert swept.returncode == 0, swept.stderr
    assert (toy_harness.directory / "runs/swept/1/result.json").is_file()


def test_a_file_cannot_choose_a_kind_from_another_package(toy_harness: Harness) -> None:
    """A configuration file must not choose where code runs."""
    own = toy_harness.directory / "own/experiment/evil.yaml"
    own.write_text("# @package _global_\ndefaults: [toy]\ncluster: {kind: toy}\n")
    rejected = toy_harness.launch("train", "--config-dir", "own", "experiment=evil", "run.name=evil")
    assert rejected.returncode == 2, rejected.stderr


# ---- the keys -------------------------------------------------------------------------------------------------------


def test_every_kind_is_registered_with_its_keys() -> None:
    assert {kind.name for kind in kinds()} >= {"local", "none", "existing", "ssh", "azure", "kuberay"}
    for kind in kinds():
        assert kind.config().kind == kind.name
        assert cluster_section({"kind": kind.name}) == kind.config()
        kind.check(kind.config())
    assert len([kind for kind in kinds() if kind.is_default]) == 1
    with pytest.raises(ConfigError, match="gone"):
        named("gone")


def test_an_old_configuration_with_the_keys_of_all_kinds_is_read(tmp_path: Path) -> None:
    """config.yaml of earlier versions lists every key. Keys of other kinds with default values are ignored."""
    stored = tmp_path / "config.yaml"
    section = {**asdict(cluster_schema()()), "keep_minutes": 3.0}
    stored.write_text(yaml.safe_dump({**asdict(compose(["experiment=mnist_tiny"]).job), "cluster": section}))
    composition = compose([], stored=stored)
    assert composition.job.cluster == LocalCluster(keep_minutes=3.0)
    assert set(composition.tree()["cluster"]) == set(asdict(LocalCluster()))


def test_a_change_of_kind_keeps_the_common_keys() -> None:
    ssh = SshCluster(hosts=["vm1"], env=["HOME"], budget_usd=2.0)
    changed = ssh.changed_to(named("existing"), address="head:1")
    assert changed == ExistingCluster(address="head:1", env=["HOME"], budget_usd=2.0)
    job = Job(cluster=ssh)
    assert Job.from_dict(asdict(job)).cluster == ssh
