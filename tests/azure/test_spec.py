"""The specification of an Azure cluster: names, alternatives, and the text of every generated file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from launcher.clusters.azure import network, ray_yaml
from launcher.clusters.azure.kind import AzureCluster
from launcher.clusters.azure.spec import ClusterSpec, cluster_specs, for_run
from launcher.config.schema import ScalingConfig
from launcher.errors import ConfigError

HERE = Path(__file__).parent
SUBSCRIPTION = "00000000-1111-2222-3333-444444444444"
LOCAL = ray_yaml.LocalFiles(
    subscription=SUBSCRIPTION,
    key="/home/ada/.local/state/launch/clusters/demo.key",
    known_hosts="/home/ada/.local/state/launch/clusters/demo.hosts",
    files={"/home/ubuntu/launch/code/launcher": "/src/launcher"},
    azure=["azure-core==1.35.0"],
)


def spec_of(**keys: Any) -> ClusterSpec:
    """Return the specification of a configuration, in zone 2 and with SSH from one address."""
    cluster = AzureCluster(name="demo", size="Standard_NC24ads_A100_v4", **keys)
    return replace(cluster_specs(cluster, ask=False)[0], zone="2", ssh_from="203.0.113.7/32")


def compare(name: str, text: str) -> None:
    golden = HERE / name
    if text != golden.read_text():
        Path("/tmp", f"golden-{name}").write_text(text)
    assert text == golden.read_text()


@pytest.mark.golden
def test_the_file_for_ray_up() -> None:
    """Golden text, because every line affects cost or security."""
    compare("ray_up.yaml", ray_yaml.text(spec_of(nodes=4, min_nodes=0, spot="prefer", down_after=True), LOCAL))


def test_the_nodes_mount_the_storage() -> None:
    """Nodes that replace an evicted one mount it as well, and the file contains no key."""
    mounts = {"/data": "abfss://images@imagenet.dfs.core.windows.net/2012"}
    plain, mounted = (ray_yaml.ray_config(spec_of(mounts=each), LOCAL) for each in ({}, mounts))
    compare("mounts.sh", "\n".join(mounted["worker_setup_commands"]) + "\n")
    assert {key for key in plain if plain[key] != mounted[key]} == {"worker_setup_commands"}


def test_a_failed_mount_does_not_fail_the_node(tmp_path: Path) -> None:
    """Otherwise Ray's autoscaler would create it again and again."""
    (tmp_path / "command").write_text("")
    for name in ("sudo", "blobfuse2", "apt-get", "mountpoint"):
        (tmp_path / name).write_text("#!/bin/sh\necho no role >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    mounts = {"/data": "abfss://images@imagenet.dfs.core.windows.net/2012"}
    (line,) = ray_yaml.ray_config(spec_of(mounts=mounts), LOCAL)["worker_setup_commands"]
    line = line.replace(ray_yaml.DIRECTORY, str(tmp_path)).replace("/var/cache", f"{tmp_path}/cache")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, "no role" in done.stdout) == (0, True)


@pytest.mark.golden
def test_the_network() -> None:
    compare("network.json", json.dumps(network.template(spec_of()), indent=2) + "\n")


@pytest.mark.parametrize("spot", [True, False, "prefer"])
def test_only_nodes_are_spot_vms(spot: Any) -> None:
    """Their maximum price is the on-demand price, and they are deleted when evicted. The head is never a spot VM."""
    config = ray_yaml.ray_config(spec_of(spot=spot), LOCAL)
    for kind, node_type in config["available_node_types"].items():
        parameters = node_type["node_config"]["azure_arm_parameters"]
        is_spot = kind == "node" and spot is not False
        assert parameters.get("priority") == ("Spot" if is_spot else None)
        assert parameters.get("billingProfile") == ({"maxPrice": -1} if is_spot else None)
    assert config["provider"]["on_demand_instead"] is (spot == "prefer")


def test_ray_accepts_the_file() -> None:
    """Ray's own validation of the file passes."""
    config = ray_yaml.ray_config(spec_of(nodes=4, spot="prefer"), LOCAL)
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", ["a", "demo-2", "a" * 40])
def test_valid_names(name: str) -> None:
    assert cluster_specs(AzureCluster(name=name, size="NC24ads_A100_v4"), ask=False)[0].group == f"launch-{name}"


@pytest.mark.parametrize("name", ["A", "2x", "a-", "a_b", "a" * 41, "a.b"])
def test_names_that_azure_or_ray_rejects(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.name="):
        cluster_specs(AzureCluster(name=name, size="NC24ads_A100_v4"), ask=False)


def test_the_longest_name_leaves_space_for_the_suffixes_of_ray() -> None:
    """Azure truncates VM names to 64 characters, so two longer names could become equal."""
    name = f"ray-{'a' * 40}-worker-1234-5678"
    assert len(name) + len("31") <= 64


def test_alternatives_are_in_order() -> None:
    others = [{"region": "westeurope"}, {"size": "Standard_NC40ads_H100_v5", "spot": False}]
    cluster = AzureCluster(size="NC24ads_A100_v4", zone="1", spot=True, alternatives=others)
    found = [
        (one.nodes.size.name, one.nodes.region, one.zone, one.nodes.spot) for one in cluster_specs(cluster, ask=False)
    ]
    assert found == [
        ("Standard_NC24ads_A100_v4", "eastus", "1", True),
        ("Standard_NC24ads_A100_v4", "westeurope", None, True),
        ("Standard_NC40ads_H100_v5", "eastus", "1", False),
    ]


@pytest.mark.parametrize(
    ("keys", "key", "quoted"),
    [
        ({}, "cluster.size", "cluster.size=SIZE"),
        ({"size": "Standard_NC6s_v3"}, "cluster.size", "2025-09-30"),
        ({"size": "NC144ds_xl_RTXPRO6000BSE_v6"}, "cluster.size", "GRID v20"),
        ({"size": "NC8ads_A10_v4"}, "cluster.size", "NC8ads_A10_v4.*GRID"),
        (
            {"size": "NC24ads_A100_v4", "mounts": {"/data": "claim://images"}},
            "cluster.mounts",
            "/data .*claim://images",
        ),
        ({"size": "NC24ads_A100_v4", "min_nodes": 2}, "cluster.min_nodes", "=2 .*cluster.nodes=1"),
        ({"size": "NC24ads_A100_v4", "alternatives": [{"sise": "x"}]}, "cluster.alternatives", "'sise'"),
        ({"size": "NC24ads_A100_v4", "alternatives": ["westeurope"]}, "cluster.alternatives", "'westeurope'"),
    ],
)
def test_invalid_configurations(keys: dict[str, Any], key: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted) as caught:
        cluster_specs(AzureCluster(**keys), ask=False)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("cluster", "scaling", "most", "enough"),
    [
        ({"min_nodes": 0}, {}, 8, 1),
        ({"min_nodes": 3}, {}, 8, 3),
        ({}, {}, 8, 8),
        ({"min_nodes": 0}, {"workers": 3}, 3, 3),
        ({"min_nodes": 0}, {"workers": 3, "min_workers": 1}, 3, 1),
        ({"min_nodes": 5}, {"workers": 3}, 5, 5),
        ({"min_nodes": 0}, {"workers": 4, "gpus_per_worker": 0.5}, 2, 2),
        ({"min_nodes": 0}, {"device": "cpu"}, 1, 1),
        ({"min_nodes": 0}, {"workers": 99}, 8, 8),  # rejected on the head, where the resources are known
    ],
)
def test_a_run_waits_for_the_nodes_of_its_workers(
    cluster: dict[str, Any], scaling: dict[str, Any], most: int, enough: int
) -> None:
    """With min_nodes=0 no GPU exists before the run, so `auto` cannot count GPUs."""
    spec = for_run(spec_of(nodes=8, **cluster), ScalingConfig(**scaling))
    assert (spec.min_nodes, spec.enough) == (most, enough)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync not found")
@pytest.mark.parametrize("name", ["demo", "secrets", "password"])
def test_the_key_is_sent_and_other_secrets_are_not(tmp_path: Path, name: str) -> None:
    """Ray applies the patterns to every file that it sends, and its autoscaler needs the key to reach the nodes."""
    key, head = tmp_path / f"{name}.key", tmp_path / "head"
    key.write_text("a key")
    (tmp_path / "code").mkdir()
    for file in ("module.py", ".env", "other.pem"):
        (tmp_path / "code" / file).write_text("text")
    excluded = ray_yaml.ray_config(spec_of(), replace(LOCAL, key=str(key)))["rsync_exclude"]
    options = [word for pattern in excluded for word in ("--exclude", pattern)]
    head.mkdir()
    # As `ray up` does.
    for source, target in ((str(key), head / "ray_bootstrap_key.pem"), (f"{tmp_path}/code/", head / "code")):
        subprocess.run(["rsync", "-a", *options, source, str(target)], check=True)
    assert sorted(path.name for path in head.rglob("*") if path.is_file()) == ["module.py", "ray_bootstrap_key.pem"]
