"""The file for `ray up`: what Ray's cluster launcher is told. No secret is in it.

The token that all nodes share is made on the head, which hands it to the workers it starts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from launcher.clusters.azure import network
from launcher.clusters.azure.spec import DIRECTORY, PYTHON, SPENT_FILE, USER, ClusterSpec
from launcher.clusters.pricing.catalogue import Vm
from launcher.clusters.remote import mounts
from launcher.money import SPENT_VARIABLE
from launcher.ray_seam.settings import COMMAND, NO_METRICS
from launcher.runs import secret_files

PORT = 6379
DASHBOARD = 8265
TOKEN = "~/.ray/auth_token"
CODE = f"{DIRECTORY}/code"
HEAD, NODE = "head", "node"
IMAGE = {"imagePublisher": "microsoft-dsvm", "imageOffer": "ubuntu-hpc", "imageSku": "2404", "imageVersion": "latest"}
DISK_GB = 128
_OWN = "$(hostname -I | cut -d' ' -f1)"  # the address of the VM in its network
_SETUP = [
    f"test -x {PYTHON} || python3 -m venv {DIRECTORY}/env || (sudo apt-get update -qq && sudo apt-get -o "
    f"DPkg::Lock::Timeout=300 install -y -qq python3-venv && python3 -m venv {DIRECTORY}/env)",
    f"{PYTHON} -c 'import ray, torch' || {PYTHON} -m pip install --quiet --requirement {CODE}/requirements.txt "
    f"--constraint {CODE}/constraints.txt",
]
_RAY = " ".join([PYTHON, *COMMAND])
_NO_METRICS = " ".join(f"{name}={value}" for name, value in NO_METRICS.items())
_ENVIRONMENT = f"export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 {_NO_METRICS} PYTHONPATH={CODE}"


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """What the cluster takes from this machine.

    Attributes:
        subscription: Azure's.
        key: the private SSH key's file; its public half has `.pub` behind it.
        known_hosts: the file of the head's SSH host key.
        files: what is copied to every VM: path there -> path here.
        azure: packages that the head needs to create VMs, with their versions.
    """

    subscription: str
    key: str
    known_hosts: str
    files: Mapping[str, str]
    azure: Sequence[str] = ()


def ray_config(wanted: ClusterSpec, local: LocalFiles) -> dict[str, Any]:
    """Return what Ray's cluster launcher is told, in its own words."""
    base = network.ids(local.subscription, wanted)
    nodes = wanted.nodes
    types: dict[str, Any] = {
        # No CPU for anybody: what trains runs on the nodes.
        HEAD: {"resources": {"CPU": 0}, "node_config": _vm(nodes.head, wanted, spot=False)}
    }
    types[NODE] = {
        "resources": {"CPU": nodes.size.vcpus, "GPU": nodes.size.gpus},
        "min_workers": 0,  # Ray would never remove those when idle
        "max_workers": nodes.nodes,
        "node_config": _vm(nodes.size, wanted, spot=nodes.spot is not False),
    }
    return {
        "cluster_name": wanted.name,
        "max_workers": nodes.nodes,
        "idle_timeout_minutes": wanted.idle_minutes,
        "provider": {
            "type": "external",
            "module": "launcher.clusters.azure.provider.Provider",
            "subscription_id": local.subscription,
            "resource_group": wanted.group,
            "location": nodes.region,
            "availability_zone": wanted.zone or "none",
            "unique_id": wanted.unique_id,
            "use_internal_ips": True,
            "use_external_head_ip": True,
            "cache_stopped_nodes": False,
            "msi": base["head"],
            "nodes_msi": base["nodes"],
            "nsg": base["nsg"],
            "subnet": base["subnet"],
            "known_hosts": local.known_hosts,
            "launch_attempts": wanted.launch_attempts,
            # Not a second kind of node for Ray: its autoscaler does not turn to another kind where one is refused.
            "on_demand_instead": nodes.spot == "prefer",
        },
        "auth": {"ssh_user": USER, "ssh_private_key": local.key, "ssh_public_key": f"{local.key}.pub"},
        "available_node_types": types,
        "head_node_type": HEAD,
        "file_mounts": dict(local.files),
        "rsync_exclude": ["__pycache__", *_withheld(local)],
        "cluster_synced_files": [TOKEN],
        "initialization_commands": [],
        "setup_commands": _SETUP,
        "head_setup_commands": [
            f"test -s {TOKEN} || (umask 077; mkdir -p ~/.ray; openssl rand -hex 32 > {TOKEN})",
            # Where `launcher.clusters.ssh` has them.
            f"ln -sfn {TOKEN} {DIRECTORY}/token; ln -sfn {CODE} {DIRECTORY}/launch",
            *([f"{PYTHON} -m pip install --quiet {' '.join(local.azure)}"] if local.azure else []),
        ],
        "worker_setup_commands": _mounted(wanted),
        "head_start_ray_commands": [
            f"{_RAY} stop",
            f"{_ENVIRONMENT} {SPENT_VARIABLE}={SPENT_FILE}; ulimit -n 65536; "
            f"{_RAY} start --head --port={PORT} "
            f"--object-manager-port=8076 --node-ip-address={_OWN} --autoscaling-config=~/ray_bootstrap_config.yaml "
            f"--dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD}",
            _agent("eviction", f"launcher.clusters.eviction --address {_OWN}:{PORT}"),
            _agent("watchdog", _watchdog(wanted)),
        ],
        "worker_start_ray_commands": [
            f"{_RAY} stop",
            _agent("eviction", f"launcher.clusters.eviction --address $RAY_HEAD_IP:{PORT}"),
            f"{_ENVIRONMENT}; ulimit -n 65536; {_RAY} start --address=$RAY_HEAD_IP:{PORT} "
            f"--object-manager-port=8076 --node-ip-address={_OWN}",
        ],
    }


def _withheld(local: LocalFiles) -> list[str]:
    """Return the patterns of secret files, without those that match the cluster's own key.

    Ray applies them to every file that it sends, and without the key its autoscaler reaches no node.
    """
    own = PurePath(local.key).name
    return [pattern for pattern in secret_files.PATTERNS if not fnmatchcase(own, pattern)]


def text(wanted: ClusterSpec, local: LocalFiles) -> str:
    """Return the file."""
    import yaml

    told = yaml.safe_dump(ray_config(wanted, local), sort_keys=False, width=10_000)
    return f"# Written by launch for `ray up`; written anew by every `launch up`.\n{told}"


def _vm(vm: Vm, wanted: ClusterSpec, spot: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "vmSize": vm.name,
        **IMAGE,
        "osDiskSize": DISK_GB,
        "enableAcceleratedNetworking": bool(getattr(vm, "accelerated_networking", True)),
    }
    if spot:
        # maxPrice -1: up to the price on demand, so that only a want of capacity evicts.
        asked |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"tags": wanted.tags, "azure_arm_parameters": asked}


def _mounted(wanted: ClusterSpec) -> list[str]:
    """Return the lines by which a node that comes at any time has `cluster.mounts`.

    A storage that refuses ends no node, which would be made again and again: what it says is in a file there, and the
    run, which mounts what is missing before it begins, is refused with the same words.
    """
    lines = mounts.setup_lines(wanted.mounts)
    script = shlex.quote("\n".join(["set -e", *lines]))
    return [f"sh -c {script} > {DIRECTORY}/mounts.log 2>&1 || cat {DIRECTORY}/mounts.log"] if lines else []


def _watchdog(wanted: ClusterSpec) -> str:
    gpus = wanted.nodes.size.gpus
    words = f"launcher.clusters.azure.on_head watch --nodes {wanted.min_nodes} --gpus {gpus}"
    words += f" --idle-minutes {wanted.idle_minutes:g}"
    return f"{words} --remove" if wanted.down_after else words


def _agent(name: str, module: str) -> str:
    """Return the line that starts a small program beside Ray, once: a second one finds the lock taken and ends."""
    assert re.fullmatch(r"[a-z]+", name)
    place = f"{DIRECTORY}/{name}"
    return (
        f"{_ENVIRONMENT}; nohup flock --nonblock {place}.lock {PYTHON} -m {module} >> {place}.log 2>&1 < /dev/null & "
        "sleep 0.2"
    )
