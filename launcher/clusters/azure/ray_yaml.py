"""The configuration file for `ray up`, Ray's cluster launcher. It contains no secret.

The token that all nodes share is created on the head, which copies it to the nodes that it starts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

import yaml

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
_OWN = "$(hostname -I | cut -d' ' -f1)"  # the private address of the VM
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
    """Files and settings of this machine that the configuration refers to.

    Attributes:
        subscription: the id of the Azure subscription.
        key: the path of the private SSH key; the path of the public key is the same with the suffix `.pub`.
        known_hosts: the path of the file with the SSH host key of the head.
        files: the files that are copied to every VM: path on the VM -> local path.
        azure: the pinned packages with which the head creates VMs.
    """

    subscription: str
    key: str
    known_hosts: str
    files: Mapping[str, str]
    azure: Sequence[str] = ()


def ray_config(spec: ClusterSpec, local: LocalFiles) -> dict[str, Any]:
    """Return the configuration for `ray up`, as Ray's cluster launcher defines it."""
    base = network.ids(local.subscription, spec)
    nodes = spec.nodes
    types: dict[str, Any] = {
        # No CPUs, so that Ray places all workers on the nodes.
        HEAD: {"resources": {"CPU": 0}, "node_config": _vm(nodes.head, spec, spot=False)}
    }
    types[NODE] = {
        "resources": {"CPU": nodes.size.vcpus, "GPU": nodes.size.devices},
        "min_workers": 0,  # Ray never removes this many nodes, even if they are idle
        "max_workers": nodes.nodes,
        "node_config": _vm(nodes.size, spec, spot=nodes.spot is not False),
    }
    return {
        "cluster_name": spec.name,
        "max_workers": nodes.nodes,
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": {
            "type": "external",
            "module": "launcher.clusters.azure.provider.Provider",
            "subscription_id": local.subscription,
            "resource_group": spec.group,
            "location": nodes.region,
            "availability_zone": spec.zone or "none",
            "unique_id": spec.unique_id,
            "use_internal_ips": True,
            "use_external_head_ip": True,
            "cache_stopped_nodes": False,
            "msi": base["head"],
            "nodes_msi": base["nodes"],
            "nsg": base["nsg"],
            "subnet": base["subnet"],
            "known_hosts": local.known_hosts,
            "launch_attempts": spec.launch_attempts,
            # Handled by the provider: Ray's autoscaler does not switch to a second node type if launches of one fail.
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
            # The same paths as in clusters of `launcher.clusters.ssh`.
            f"ln -sfn {TOKEN} {DIRECTORY}/token; ln -sfn {CODE} {DIRECTORY}/launch",
            *([f"{PYTHON} -m pip install --quiet {' '.join(local.azure)}"] if local.azure else []),
        ],
        "worker_setup_commands": _mounted(spec),
        "head_start_ray_commands": [
            f"{_RAY} stop",
            f"{_ENVIRONMENT} {SPENT_VARIABLE}={SPENT_FILE}; ulimit -n 65536; "
            f"{_RAY} start --head --port={PORT} "
            f"--object-manager-port=8076 --node-ip-address={_OWN} --autoscaling-config=~/ray_bootstrap_config.yaml "
            f"--dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD}",
            _agent("eviction", f"launcher.clusters.eviction --address {_OWN}:{PORT}"),
            _agent("watchdog", _watchdog(spec)),
        ],
        "worker_start_ray_commands": [
            f"{_RAY} stop",
            _agent("eviction", f"launcher.clusters.eviction --address $RAY_HEAD_IP:{PORT}"),
            f"{_ENVIRONMENT}; ulimit -n 65536; {_RAY} start --address=$RAY_HEAD_IP:{PORT} "
            f"--object-manager-port=8076 --node-ip-address={_OWN}",
        ],
    }


def _withheld(local: LocalFiles) -> list[str]:
    """Return the patterns of secret files, except those that match the cluster's own key.

    Ray applies the patterns to every file that it copies, and its autoscaler needs the key to reach the nodes.
    """
    own = PurePath(local.key).name
    return [pattern for pattern in secret_files.PATTERNS if not fnmatchcase(own, pattern)]


def text(spec: ClusterSpec, local: LocalFiles) -> str:
    """Return the configuration as YAML."""
    document = yaml.safe_dump(ray_config(spec, local), sort_keys=False, width=10_000)
    return f"# Written by launch for `ray up`; every `launch up` overwrites it.\n{document}"


def _vm(vm: Vm, spec: ClusterSpec, spot: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "vmSize": vm.name,
        **IMAGE,
        "osDiskSize": DISK_GB,
        "enableAcceleratedNetworking": bool(getattr(vm, "accelerated_networking", True)),
    }
    if spot:
        # maxPrice -1 is the on-demand price: VMs are evicted for capacity only.
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"tags": spec.tags, "azure_arm_parameters": parameters}


def _mounted(spec: ClusterSpec) -> list[str]:
    """Return the shell lines that mount `cluster.mounts` on every node, including nodes that are created later.

    A failed mount does not fail the node, which the autoscaler would create again and again. The error is written to
    a file on the node, and a run, which mounts missing directories before it starts, fails with the same error.
    """
    lines = mounts.setup_lines(spec.mounts)
    script = shlex.quote("\n".join(["set -e", *lines]))
    return [f"sh -c {script} > {DIRECTORY}/mounts.log 2>&1 || cat {DIRECTORY}/mounts.log"] if lines else []


def _watchdog(spec: ClusterSpec) -> str:
    gpus = spec.nodes.size.devices
    command = f"launcher.clusters.azure.on_head watch --nodes {spec.min_nodes} --gpus {gpus}"
    command += f" --idle-minutes {spec.idle_minutes:g}"
    return f"{command} --remove" if spec.down_after else command


def _agent(name: str, module: str) -> str:
    """Return the shell line that starts a program next to Ray. A lock ensures that only one instance runs."""
    assert re.fullmatch(r"[a-z]+", name)
    place = f"{DIRECTORY}/{name}"
    return (
        f"{_ENVIRONMENT}; nohup flock --nonblock {place}.lock {PYTHON} -m {module} >> {place}.log 2>&1 < /dev/null & "
        "sleep 0.2"
    )
