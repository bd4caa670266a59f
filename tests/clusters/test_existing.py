"""`cluster=existing`: its address, the checks of its nodes, and training on it over real links."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from launcher.clusters.gcs import address_of
from launcher.clusters.remote.compare import facts_of_a_node
from launcher.clusters.remote.on_host import interface_of
from launcher.errors import ClusterError
from tests.support.command import LAUNCH, PROJECT, Place, Result
from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.lab import Lab
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TINY = ("experiment=mnist_tiny", "logging.graph=false", "trainer.deterministic=true")


@pytest.mark.parametrize(
    ("asked", "variable", "found"),
    [("10.0.0.4:6379", None, "10.0.0.4:6379"), (None, "head:6379", "head:6379"), ("a:1", "b:2", "a:1")],
)
def test_the_address_is_the_key_or_the_variable_of_ray(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, variable: str | None, found: str
) -> None:
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address_of(asked) == found


@pytest.mark.parametrize(("asked", "found"), [(None, "none"), ("head", "'head'"), ("ray://head:10001", "ray")])
def test_an_invalid_address_is_an_error_with_the_right_form(asked: str | None, found: str) -> None:
    with pytest.raises(ClusterError, match=found) as caught:
        address_of(asked)
    assert "cluster.address=HOST:PORT" in str(caught.value)


def test_the_interface_with_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None


def test_the_facts_about_a_node(tmp_path: Path) -> None:
    own = facts_of_a_node()(str(ROOT), [str(tmp_path)], [])
    assert re.fullmatch("[0-9a-f]{12}", own["project"])
    assert own["no_modules"] == []
    assert facts_of_a_node()(str(ROOT), [], [str(tmp_path / "absent")])["no_run"] == [str(tmp_path / "absent")]


def test_an_address_without_a_server_is_an_error(here: Place) -> None:
    refused = here.here(*TINY, "cluster=existing", "cluster.address=127.0.0.1:9")
    assert refused.status == 2
    assert "127.0.0.1:9" in refused.err
    assert not here.runs.exists()


# ---- over real links ------------------------------------------------------------------------------------------------


def launch(lab: Lab, directory: Path, *words: str, on: int = 0, env: dict[str, str] | None = None) -> Result:
    address = [] if "cluster=none" in words else ["cluster=existing", f"cluster.address={lab.address}"]
    done = lab.hosts[on].run([str(LAUNCH), *address, *words], cwd=directory, seconds=100, env=env)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The calling directory, on a file system that the machines share."""
    return Path(shutil.copytree(PROJECT, tmp_path / "calling", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.smoke
def test_two_machines_train_like_one_process_and_the_cluster_keeps_running(cluster: Lab, directory: Path) -> None:
    plan = launch(cluster, directory, "plan", *TINY, "--json")
    assert plan.status == 0, plan.err
    machines = json.loads(plan.out)["machines"]
    assert (machines["cluster"], machines["workers"], machines["cpus"]) == ("existing", 2, 2)
    assert all(f"{host.name} {host.address}" in machines["description"] for host in cluster.hosts[:2])

    # On the machine that is not the head, with the environment variable.
    words, variable = [str(LAUNCH), *TINY, "cluster=existing", "run.name=two"], {"RAY_ADDRESS": cluster.address}
    done = cluster.hosts[1].run(words, cwd=directory, seconds=100, env=variable)
    assert done.returncode == 0, done.stderr
    assert launch(cluster, directory, *TINY, "cluster=none", "run.name=one").status == 0
    one, two = (json.loads((directory / "runs" / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["metrics"]["train/loss"] == two["metrics"]["train/loss"]
    assert_same_weights(final_weights(directory / "runs" / "one"), final_weights(directory / "runs" / "two"))
    assert len(cluster.nodes()) == 2

    def left() -> list[str]:
        running = [words for host in cluster.hosts[:2] for words in host.processes().values()]
        return [words for words in running if "TrainController" in words]

    wait_for(lambda: not left(), 20, left)  # Ray ends the actors of a driver after the driver

    cluster.hosts[1].cut()  # Ray treats it as alive for a minute; a new command must not
    plan = launch(cluster, directory, "plan", *TINY, "--json")
    assert plan.status == 0, plan.err
    assert cluster.hosts[1].name not in json.loads(plan.out)["machines"]["description"]
    assert len(cluster.nodes()) == 2


def test_different_versions_on_a_node_are_an_error_before_training(
    cluster: Lab, directory: Path, tmp_path: Path
) -> None:
    for name in ("launcher", "models", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other/launcher/formatting.py").open("a") as file:
        file.write("# another version\n")
    (tmp_path / "other/torch-9.9.dist-info").mkdir()
    (tmp_path / "other/torch-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")

    words = [sys.executable, "-m", "launcher", *TINY, "cluster=existing", f"cluster.address={cluster.address}"]
    env = {"PYTHONPATH": str(tmp_path / "other")}
    refused = cluster.head.run([*words, "run.name=refused"], cwd=directory, seconds=100, env=env)

    assert refused.returncode == 2, refused.stderr
    assert "and 9.9 here" in refused.stderr
    for host in cluster.hosts[:2]:
        assert re.search(rf"this project \(.*?\) is \w+ on {host.name} \({host.address}\)", refused.stderr)
    assert not (directory / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (("scaling.workers=3",), {}, r"3 workers .*2 CPUs in the cluster.*scaling.workers=2"),
        ((), {"RAY_AUTH_TOKEN": "0" * 64}, r"RAY_AUTH_TOKEN"),
        ((), {"RAY_AUTH_TOKEN": ""}, r"RAY_AUTH_TOKEN"),
    ],
)
def test_an_infeasible_request_is_rejected(
    cluster: Lab, directory: Path, words: tuple[str, ...], env: dict[str, str], message: str
) -> None:
    refused = launch(cluster, directory, *TINY, *words, env=env)
    assert refused.status == 2, refused.err
    assert re.search(message, refused.err), refused.err
    assert not (directory / "runs").exists()


def test_a_driver_must_run_on_a_node(cluster: Lab, directory: Path) -> None:
    refused = launch(cluster, directory, *TINY, on=2)
    assert refused.status == 2, refused.err
    assert "(vm3) is not a node" in refused.err
    assert not (directory / "runs").exists()
