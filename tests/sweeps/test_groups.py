"""Warm worker groups with real Ray Train workers: reuse of processes, and recovery from errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from group_jobs import Task

from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.errors import UserCodeError, WorkerLost
from launcher.runners.tasks import Shape, TaskOutcome, fits
from tests.support.clock_ahead import AHEAD, SITE
from tests.support.waiting import wait_for

CPUS = 2
PAIR = Shape(2, 1.0, 0.0)
SINGLE = Shape(1, 1.0, 0.0)


class Driver:
    """The groups of one cluster, and all of their events."""

    def __init__(self, cluster: EmbeddedRay) -> None:
        from launcher.runners.groups import Groups

        self.events: list[tuple[str, dict[str, Any]]] = []
        self.groups = Groups(cluster, lambda key, event: self.events.append((key, event)), main="group_jobs:main")

    def start(self, key: str, note: str, shape: Shape = PAIR) -> None:
        self.until(lambda: self.groups.ready(shape), f"no room for {key}")
        self.groups.submit(key, Task(note), shape)

    def until(self, done: Any, what: str) -> list[TaskOutcome]:
        ended: list[TaskOutcome] = []

        def polled() -> Any:
            ended.extend(self.groups.poll())
            return done()

        wait_for(polled, 100, what)  # two starts of worker processes
        return ended

    def do(self, note: str, shape: Shape = PAIR) -> TaskOutcome:
        self.start("task", note, shape)
        (ended,) = self.until(lambda: "task" not in self.groups.running, f"{note} did not end")
        assert ended.key == "task"
        return ended


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """The clocks of all workers are ahead."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        with EmbeddedRay(CPUS, 0, preload=("launcher.runners.groups",)) as cluster:
            driver = Driver(cluster)
            yield driver
            driver.groups.close()


def test_a_clock_that_is_ahead_changes_the_age_of_no_task(driver: Driver) -> None:
    """Otherwise the difference of the clocks is added to the duration and the cost of every trial."""
    for _ in range(2):  # the group measures the difference once
        result = driver.do("age").result
        assert result is not None
        assert 0 <= result["ages"][0] < AHEAD / 2, "rank 0 records durations and costs"


def test_fifty_tasks_share_two_processes_which_do_not_grow(driver: Driver) -> None:
    """Would be wrong: a start for each task, or memory, threads and files that each task leaves behind."""
    first = driver.do("facts").result
    assert first is not None
    for _ in range(5):
        warm = driver.do("train_a_little").result
    for _ in range(50):
        last = driver.do("train_a_little").result
    assert driver.do("facts").result == first
    assert warm is not None
    assert last is not None
    assert last["mib"] - warm["mib"] < 30  # 50 networks would be 600
    assert last["threads"] <= warm["threads"] + 2
    assert last["files"] <= warm["files"] + 4


def test_an_error_on_one_rank_leaves_the_processes_usable(driver: Driver) -> None:
    """Would be wrong: ten seconds for a new group after each failed trial, or remains that affect the next task."""
    before = driver.do("facts").result

    failed = driver.do("fail_on_rank_1")

    assert isinstance(failed.error, UserCodeError)
    assert "ZeroDivisionError: mine" in str(failed.error)
    assert "group_jobs.py" in failed.error.traceback_text
    assert driver.do("facts").result == before


def test_requests_reach_only_their_task(driver: Driver) -> None:
    """Would be wrong: the next task receives the request that ended the previous one."""
    for what in ("prune", "stop"):
        driver.start(what, f"until_stopped {what}")
        seen = len(driver.events)
        driver.until(lambda seen=seen: len(driver.events) > seen + 2, "no events")
        driver.groups.request(what, what)
        (ended,) = driver.until(lambda: not driver.groups.running, "did not stop")
        assert (ended.key, ended.result) == (what, {"stopped": what})


def test_a_killed_worker_costs_its_group_alone(driver: Driver) -> None:
    before = driver.do("facts").result

    lost = driver.do("die_on_rank_1")

    assert isinstance(lost.error, WorkerLost)
    assert "Worker 1 of 2" in str(lost.error)
    after = driver.do("facts").result
    assert before is not None
    assert after is not None
    assert not set(before["pids"]) & set(after["pids"])


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_hold_up_the_sweep(driver: Driver) -> None:
    hung = driver.do("hang_after_an_error")

    assert isinstance(hung.error, UserCodeError)
    assert driver.do("facts").result is not None


def test_idle_groups_of_another_size_end_when_their_cpus_are_needed(driver: Driver) -> None:
    """Would be wrong: a task that waits forever, or two groups where one fits."""
    assert driver.do("facts").result is not None  # the pair is idle, and holds both CPUs

    driver.start("a", "until_stopped stop", SINGLE)
    driver.start("b", "until_stopped stop", SINGLE)

    assert driver.groups.count() == 2
    assert not driver.groups.ready(SINGLE)
    driver.until(lambda: {"a", "b"} <= {key for key, _ in driver.events}, "no events")
    for key in ("a", "b"):
        driver.groups.request(key, "stop")
    ended = driver.until(lambda: not driver.groups.running, "did not stop")
    assert {end.key: end.result for end in ended} == {key: {"stopped": "stop"} for key in ("a", "b")}


@pytest.mark.parametrize(
    ("shapes", "cpus", "gpus", "expected"),
    [
        ([PAIR], 2, 0, True),
        ([PAIR, SINGLE], 2, 0, False),
        ([Shape(1, 0.5, 0.0)] * 4, 2, 0, True),
        ([Shape(1, 0.5, 0.25)] * 4, 2, 1, True),
        ([Shape(1, 0.1, 0.25)] * 5, 2, 1, False),
        ([Shape(1, 0.1, 0.6)] * 2, 2, 1, False),
        ([Shape(1, 0.1, 0.6)] * 3, 8, 2, False),  # 1.8 of 2, but no GPU has enough capacity for a second one
        ([Shape(2, 1.0, 1.0), Shape(1, 1.0, 2.0)], 8, 4, True),
        ([Shape(2, 1.0, 1.0), Shape(1, 1.0, 2.0)], 8, 3, False),
        ([Shape(1, 1.0, 1.0)], 8, 0, False),
    ],
)
def test_what_fits(shapes: list[Shape], cpus: float, gpus: float, expected: bool) -> None:
    assert fits(shapes, cpus, gpus) is expected
