"""The resources of a machine or cluster, and the check that workers fit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.clusters import capacity
from launcher.clusters.capacity import Node, check_feasible, check_feasible_on, worker_capacity
from launcher.errors import ResourceError


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "available"),
    [
        (2, 1.0, 0.0, (2, 0)),
        (3, 0.5, 0.0, (2, 0)),
        (10, 0.1, 0.0, (1, 0)),
        (2, 1.0, 1.0, (8, 2)),
        (4, 1.0, 0.5, (8, 2)),
        (1, 4.0, 2.0, (8, 2)),
    ],
)
def test_workers_that_fit_are_accepted(workers: int, cpus: float, gpus: float, available: tuple[float, float]) -> None:
    check_feasible(workers, cpus, gpus, available)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "available", "expected"),
    [
        (4, 1.0, 0.0, (2, 0), ["4 ", "2 CPUs", "scaling.workers=2", "scaling.cpus_per_worker=0.5"]),
        (5, 0.5, 0.0, (2, 0), ["scaling.workers=4", "scaling.cpus_per_worker=0.4"]),
        (3, 1.0, 0.0, (2, 0), ["scaling.workers=2", "scaling.cpus_per_worker=0.66"]),
        (2, 1.0, 1.0, (8, 1), ["1 GPUs", "scaling.workers=1"]),
        (2, 1.0, 1.0, (8, 0), ["0 GPUs", "scaling.device=cpu"]),
        (3, 1.0, 0.6, (8, 2), ["2 GPUs", "scaling.workers=2"]),  # 0.6 + 0.6 do not fit on one GPU
        (1, 4.0, 0.0, (2, 0), ["4 CPU ", "scaling.cpus_per_worker=2"]),
    ],
)
def test_an_impossible_request_is_rejected_with_both_numbers_and_options(
    workers: int, cpus: float, gpus: float, available: tuple[float, float], expected: list[str]
) -> None:
    with pytest.raises(ResourceError) as caught:
        check_feasible(workers, cpus, gpus, available)

    for part in expected:
        assert part in str(caught.value)


def test_the_suggested_share_fits() -> None:
    for workers in range(1, 40):
        for cpus in (1, 2, 3, 7):
            share = math.floor(cpus / workers * 100) / 100
            check_feasible(workers, share, 0.0, (cpus, 0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"job/cpu.max": "max 100000"}, None),
        ({"job/cpu.max": "150000 100000"}, 1.5),
        (
            {"cpu.max": "50000 100000", "job/cpu.max": "max 100000"},
            0.5,
        ),  # the limit of the parent group applies as well
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cpu_limits_of_containers_are_respected(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    """Otherwise a container with half a CPU on a machine with 64 would get many workers."""
    root = tmp_path / "cgroup"
    (root / "job").mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "membership").write_text("0::/job\n")

    assert capacity._cpu_quota(root, tmp_path / "membership") == expected


def test_resources_imports_no_torch() -> None:
    code = "import sys; from launcher.clusters.capacity import resources; print(*resources(), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert 1 <= int(output[0]) <= (os.cpu_count() or 1)
    assert output[2] == "False"


def nodes(*shapes: tuple[float, float]) -> list[Node]:
    return [Node(f"{n}", f"vm{n}", f"10.0.0.{n}", cpus, gpus) for n, (cpus, gpus) in enumerate(shapes, 1)]


@pytest.mark.parametrize(
    ("shapes", "each", "fit"),
    [
        ([(1, 0), (1, 0)], (1.0, 0.0), 2),
        ([(3, 0), (3, 0)], (2.0, 0.0), 2),  # the remaining CPUs are on two machines
        ([(24, 1), (24, 2)], (1.0, 1.0), 3),
        ([(2, 4), (24, 1)], (1.0, 1.0), 3),  # GPUs without a CPU
    ],
)
def test_a_worker_does_not_span_two_nodes(
    shapes: list[tuple[float, float]], each: tuple[float, float], fit: int
) -> None:
    assert worker_capacity(nodes(*shapes), *each) == fit
    check_feasible_on(fit, *each, nodes(*shapes))
    with pytest.raises(ResourceError, match=rf"\b{fit + 1} "):
        check_feasible_on(fit + 1, *each, nodes(*shapes))
