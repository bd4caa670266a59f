"""CPUs and GPUs of this machine or of the nodes of a cluster, and the check that the requested workers fit."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ResourceError
from launcher.ray_seam import private

# ---- this machine ----------------------------------------------------------------------------------------------------


def connected() -> bool:
    """Return whether this process is connected to a Ray cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def resources() -> tuple[int, int]:
    """Return the number of CPUs (at least 1) and GPUs that this process may use.

    If the process is connected to Ray, these are the resources of the whole Ray cluster. Starts nothing and does not
    import torch.
    """
    if connected():
        total = sys.modules["ray"].cluster_resources()
        return max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cpus, math.floor(quota + 1e-6)) if quota else cpus), _gpus()


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPU limit of the control group (version 2, then 1), or None without a limit."""
    quotas = []
    with contextlib.suppress(OSError, ValueError):
        own = next(line.strip().split("::")[1] for line in membership.read_text().splitlines() if "::" in line)
        for group in (root / own.lstrip("/"), *(root / own.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (group / "cpu.max").read_text().split()
                quotas.append(int(quota) / int(period))  # "max" raises ValueError: this group has no limit
            if group == root:
                break
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            quotas.append(quota_us / int((root / "cpu/cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


# Device files of GPUs on Linux (NVIDIA, AMD, Intel, WSL). Without any of them, importing Ray (0.25 s) is not needed.
_DEVICE_FILES = ("nvidia*", "kfd", "dri", "dxg", "accel")


def _gpus() -> int:
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DEVICE_FILES):
        return 0
    return private.visible_gpus()


def check_feasible(
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    available: tuple[float, float],
    where: str = "on this machine",
) -> None:
    """Raise an error if the requested workers can never fit. Called before anything is started.

    Args:
        workers: the requested number of workers.
        cpus_per_worker: the CPUs that each worker reserves; fractions are allowed.
        gpus_per_worker: the GPUs that each worker reserves; fractions below 1 are allowed.
        available: the total numbers of CPUs and GPUs, as `resources` returns them.
        where: a description of the machine or cluster that has them, for the message.

    Raises:
        ResourceError: the workers do not fit. The message states both numbers and the options to set.
    """
    for unit, key, each, have in (
        ("CPU", "cpus_per_worker", cpus_per_worker, available[0]),
        ("GPU", "gpus_per_worker", gpus_per_worker, available[1]),
    ):
        most = most_workers(each, have, whole=unit == "GPU")
        if workers <= most:
            continue
        request = f"{workers} worker{'s' if workers > 1 else ''} with {each:g} {unit} each ({workers * each:g} in all)"
        remedies = [f"scaling.workers={most}"] if most else []
        share = math.floor(have / workers * 100) / 100
        # Fractions of a GPU are for several small runs, not for the workers of one: NCCL rejects two ranks on a device.
        if share > 0 and unit == "CPU":
            remedies.append(f"scaling.{key}={share:g}")
        if unit == "GPU" and not most:
            remedies.append("scaling.device=cpu" if have < 1 else f"scaling.{key}={have:g}")
        raise ResourceError(
            f"{request} were requested, but there are only {have:g} {unit}s {where}. Set "
            f"{' or '.join(remedies)}, or use a larger machine or a cluster."
        )


def most_workers(each: float, have: float, whole: bool) -> float:
    """Return how many shares of size `each` fit into `have` units.

    Args:
        whole: whether a share of less than one unit must fit within one unit, as on GPUs.
    """
    if each <= 0:
        return math.inf
    if whole and each < 1:
        return math.floor(have) * math.floor(1 / each + 1e-6)
    return math.floor(have / each + 1e-6)


# ---- the nodes of a cluster ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One node of a cluster: its Ray node id, host name, IP address, and the CPUs and GPUs that Ray may assign."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float


def this_machine() -> Node:
    """Return this machine as a node. If Ray is connected, the node has the resources of the whole Ray cluster."""
    cpus, gpus = resources()
    return Node("", "", "", float(cpus), float(gpus))


def worker_capacity(nodes: Sequence[Node], cpus_per_worker: float, gpus_per_worker: float) -> float:
    """Return how many workers fit on the nodes. A worker never spans two nodes."""
    return sum(
        min(
            most_workers(cpus_per_worker, node.cpus, whole=False),
            most_workers(gpus_per_worker, node.gpus, whole=True),
        )
        for node in nodes
    )


def check_feasible_on(workers: int, cpus_per_worker: float, gpus_per_worker: float, nodes: Sequence[Node]) -> None:
    """Raise an error if the requested workers can never fit on the nodes.

    Raises:
        ResourceError: the workers do not fit. The message states both numbers and the options to set.
    """
    most = worker_capacity(nodes, cpus_per_worker, gpus_per_worker)
    if workers <= most:
        return
    total = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    check_feasible(workers, cpus_per_worker, gpus_per_worker, total, where="in the cluster")
    remedy = f"Set scaling.workers={most:g}, lower" if most else "Lower"
    raise ResourceError(
        f"{workers} workers with {cpus_per_worker:g} CPU and {gpus_per_worker:g} GPU each were requested, but the "
        f"{len(nodes)} nodes can hold only {most:g}, as a worker cannot span two nodes ({describe(nodes)}). {remedy} "
        "scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes."
    )


def describe(nodes: Sequence[Node]) -> str:
    """Return a description of the nodes, such as `vm1 10.0.0.4 (24 CPU, 1 GPU), …`."""
    return ", ".join(f"{node.host} {node.address} ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in nodes)
