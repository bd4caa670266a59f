"""What this machine has, or the nodes of a cluster; and whether the workers that are asked for fit."""

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
    """Whether this process has a Ray already, which is then the one to use."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def resources() -> tuple[int, int]:
    """Return how many CPUs (at least 1) and GPUs this process may use, or the Ray has that it is connected to.

    Starts nothing, imports no torch.
    """
    if connected():
        total = sys.modules["ray"].cluster_resources()
        return max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cpus, math.floor(quota + 1e-6)) if quota else cpus), _gpus()


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPUs that the control group (version 2, then 1) grants, or None without a limit."""
    quotas = []
    with contextlib.suppress(OSError, ValueError):
        own = next(line.strip().split("::")[1] for line in membership.read_text().splitlines() if "::" in line)
        for group in (root / own.lstrip("/"), *(root / own.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (group / "cpu.max").read_text().split()
                quotas.append(int(quota) / int(period))  # "max" is no number: no limit in this group
            if group == root:
                break
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            quotas.append(quota_us / int((root / "cpu/cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


# Where Linux shows GPUs (NVIDIA's, AMD's, Intel's, WSL's). Importing Ray to learn that there is none takes 0.25 s.
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
    where: str = "here",
) -> None:
    """Refuse a request that can never be met, before anything is started.

    Args:
        workers: how many workers are asked for.
        cpus_per_worker: CPUs that each reserves; fractions are allowed.
        gpus_per_worker: GPUs that each reserves; fractions below 1 are allowed.
        available: CPUs and GPUs that there are at most, as `resources` returns them.
        where: the words for the place that has them.

    Raises:
        ResourceError: the workers do not fit; names both numbers and what to set.
    """
    for unit, key, each, have in (
        ("CPU", "cpus_per_worker", cpus_per_worker, available[0]),
        ("GPU", "gpus_per_worker", gpus_per_worker, available[1]),
    ):
        most = most_workers(each, have, whole=unit == "GPU")
        if workers <= most:
            continue
        asked = f"{workers} worker{'s' if workers > 1 else ''} with {each:g} {unit} each ({workers * each:g} in all)"
        cures = [f"scaling.workers={most}"] if most else []
        share = math.floor(have / workers * 100) / 100
        # Halves of a GPU serve several small trainings, not the workers of one: NCCL refuses two ranks on one device.
        if share > 0 and unit == "CPU":
            cures.append(f"scaling.{key}={share:g}")
        if unit == "GPU" and not most:
            cures.append("scaling.device=cpu" if have < 1 else f"scaling.{key}={have:g}")
        raise ResourceError(
            f"{asked} were asked for, and there are {have:g} {unit}s {where}. Set {' or '.join(cures)}, "
            "or use a larger machine or a cluster."
        )


def most_workers(each: float, have: float, whole: bool) -> float:
    """Return how many shares of `each` fit into `have` units; a share of less than one unit never spans two GPUs."""
    if each <= 0:
        return math.inf
    if whole and each < 1:
        return math.floor(have) * math.floor(1 / each + 1e-6)
    return math.floor(have / each + 1e-6)


# ---- the nodes of a cluster ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its id in Ray, host name, address, and what Ray may give away of it."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float


def this_machine() -> Node:
    """Return this machine as a node; where a Ray is connected, all of that Ray."""
    cpus, gpus = resources()
    return Node("", "", "", float(cpus), float(gpus))


def worker_capacity(nodes: Sequence[Node], cpus_per_worker: float, gpus_per_worker: float) -> float:
    """Return how many workers fit: one never spans two machines."""
    return sum(
        min(
            most_workers(cpus_per_worker, node.cpus, whole=False),
            most_workers(gpus_per_worker, node.gpus, whole=True),
        )
        for node in nodes
    )


def check_feasible_on(workers: int, cpus_per_worker: float, gpus_per_worker: float, nodes: Sequence[Node]) -> None:
    """Refuse what the nodes can never hold.

    Raises:
        ResourceError: names both numbers and what to set.
    """
    most = worker_capacity(nodes, cpus_per_worker, gpus_per_worker)
    if workers <= most:
        return
    total = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    check_feasible(workers, cpus_per_worker, gpus_per_worker, total, where="in the cluster")
    cure = f"Set scaling.workers={most:g}, lower" if most else "Lower"
    raise ResourceError(
        f"{workers} workers with {cpus_per_worker:g} CPU and {gpus_per_worker:g} GPU each were asked for, and the "
        f"{len(nodes)} nodes have room for {most:g}: each worker sits on one node ({describe(nodes)}). {cure} "
        "scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes."
    )


def describe(nodes: Sequence[Node]) -> str:
    """Return the nodes for people: `vm1 10.0.0.4 (24 CPU, 1 GPU), …`."""
    return ", ".join(f"{node.host} {node.address} ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in nodes)
