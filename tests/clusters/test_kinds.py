"""Cluster kinds: the registry, the conformance suite, and a kind that another package registers."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from launcher.clusters.base import kinds, named
from launcher.clusters.conformance import Harness, check
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.local.kind import LocalCluster
from launcher.clusters.ssh.kind import SshCluster
from launcher.config import compose
from launcher.config.schema import Job, cluster_schema, cluster_section
from launcher.errors import ConfigError
from tests.support.command import Place

JOB = ("--config-dir", "own", "experiment=toy", "scaling.workers=2", "trainer.deterministic=true")
LONG = ("trainer.steps=1000000", "checkpoint.every=1000", "trainer.log_every=50")
FAILING = ("data.bad=15",)
RAY = """
import sys
from launcher.clusters.local.embedded_ray import EmbeddedRay
with EmbeddedRay(2, 0) as ray:
    print(ray.address, ray.token, flush=True)
    sys.stdin.read()
"""


def harness(place: Path, words: list[str], bad: list[list[str]], **environment: str) -> Harness:
    home = {"HOME": str(place / "home"), **environment}
    return Harness(words, bad, place, JOB, LONG, FAILING, environment=home)


@pytest.fixture
def reference(place: Place, tmp_path: Path) -> Harness:
    directory = tmp_path / "reference"
    shutil.copytree(place.directory, directory)
    return harness(directory, ["cluster=local"], [])


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


@pytest.fixture
def ray() -> Iterator[tuple[str, str]]:
    """Start a Ray cluster, and return its address and token."""
    process = subprocess.Popen([sys.executable, "-c", RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address, token = process.stdout.readline().split()
        yield address, token
    finally:
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_conforms(place: Place, reference: Harness) -> None:
    check(harness(place.directory, ["cluster=local"], [["cluster.keep_minutes=-1"], ["cluster.hosts=[a]"]]), reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_existing_conforms(place: Place, reference: Harness, ray: tuple[str, str]) -> None:
    address, token = ray
    with socket.socket() as nothing:
        nothing.bind(("127.0.0.1", 0))
        bad = [["cluster.address=nowhere"], [f"cluster.address=127.0.0.1:{nothing.getsockname()[1]}"]]
        words = ["cluster=existing", f"cluster.address={address}"]
        check(harness(place.directory, words, bad, RAY_AUTH_TOKEN=token), reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kind_from_another_package_conforms(place: Place, reference: Harness, toy: str) -> None:
    """A new kind needs no change to launch. Sweeps work as well."""
    toy_harness = harness(
        place.directory, ["cluster.kind=toy"], [["cluster.toy_cpus=0"], ["cluster.toy_cpu=1"]], PYTHONPATH=toy
    )
    check(toy_harness, reference)
    swept = toy_harness.launch("-m", *JOB, *toy_harness.words, "run.name=swept", "optimizer.lr=0.1,0.2")
    assert swept.returncode == 0, swept.stderr
    assert (toy_harness.directory / "runs/swept/1/result.json").is_file()
    own = toy_harness.directory / "own/experiment/evil.yaml"
    own.write_text("# @package _global_\ndefaults: [toy]\ncluster: {kind: toy}\n")
    rejected = toy_harness.launch("train", "--config-dir", "own", "experiment=evil", "run.name=evil")
    assert rejected.returncode == 2, "a configuration file chose where code runs"


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
