"""The time at which a run leaves a machine that will be evicted."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from launcher.clusters.eviction import Notice
from launcher.runners.preemption import Evictions, seconds_needed

NODES = {"n1": "host-1", "n2": "host-2"}


def pace(save: float | None = 0.4, step: float = 0.1, evaluation: float = 0.0) -> dict[str, Any]:
    return {"kind": "pace", "save_seconds": save, "step_seconds": step, "evaluation_seconds": evaluation}


class Nodes:
    """A cluster with the notices of a test. `silent`: it does not answer; `stubborn`: it rejects a drain."""

    own = "head"

    def __init__(self) -> None:
        self.now: dict[str, Notice] = {}
        self.silent = False
        self.stubborn = False
        self.drained: list[str] = []

    def notices(self) -> dict[str, Notice]:
        if self.silent:
            raise OSError("no answer")
        return dict(self.now)

    def drain(self, node: str, notice: Notice) -> None:
        if self.stubborn:
            raise OSError("it will not")
        self.drained.append(node)


def notice(deadline: float, identity: str = "E1", vm: str = "gpu-1") -> Notice:
    return Notice(vm, "Preempt", deadline, identity)


@pytest.mark.parametrize(
    ("event", "seconds"),
    [
        (pace(), 3.8),
        (pace(save=8.0), 15.2),
        (pace(step=4.0), 11.6),
        (pace(evaluation=5.0), 8.8),
        (pace(save=None), math.inf),
        (None, math.inf),
    ],
)
def test_how_long_before_the_deadline(event: dict[str, Any] | None, seconds: float) -> None:
    assert seconds_needed(event) == pytest.approx(seconds)


# second -> deadlines by node; the engine's pace; the expected result: second -> nodes that the run leaves, within 40 s.
@pytest.mark.parametrize(
    ("story", "engine", "leaves"),
    [
        pytest.param({0: {"n1": 30}}, pace(), {27: ["n1"]}, id="as late as is safe"),
        pytest.param({0: {"n1": 30}}, pace(save=10.0), {12: ["n1"]}, id="slow saves: earlier"),
        pytest.param({0: {"n1": 3}}, pace(), {0: ["n1"]}, id="three seconds: at once"),
        pytest.param({0: {"n1": 30}}, None, {0: ["n1"]}, id="unknown time of a save: at once"),
        pytest.param({5: {"n1": -1795}}, pace(), {5: ["n1"]}, id="begun already, or drained without a deadline"),
        pytest.param({0: {"n1": 30}, 20: {}}, pace(), {}, id="withdrawn: nothing happens"),
        pytest.param({0: {"n1": 30}, 20: {"n1": 24}}, pace(), {21: ["n1"]}, id="earlier than announced"),
        pytest.param({0: {"n9": 30}}, pace(), {}, id="a node without a worker of this run"),
        pytest.param({0: {"n1": 30, "n2": 38}}, pace(), {27: ["n1", "n2"]}, id="two at a time: one regroup"),
        pytest.param({0: {"n1": 8, "n2": 39}}, pace(), {5: ["n1"], 36: ["n2"]}, id="two, far apart"),
    ],
)
def test_when_it_leaves(story: dict[int, dict[str, float]], engine: Any, leaves: dict[int, list[str]]) -> None:
    cluster, lines = Nodes(), list[str]()
    evictions = Evictions(cluster, lines.append)
    left: dict[int, list[str]] = {}
    for second in range(40):
        if second in story:
            cluster.now = {node: notice(deadline) for node, deadline in story[second].items()}
        cluster.drained = []
        nodes = {node: host for node, host in NODES.items() if not any(node in gone for gone in left.values())}
        asked = evictions.poll(nodes, engine, float(second))
        assert asked == ("regroup" if cluster.drained else None)
        if asked:
            left[second] = cluster.drained
    assert left == leaves
    announced = {node for deadlines in story.values() for node in deadlines if node in NODES}
    assert sum("(Preempt)" in line for line in lines) == len(announced)
    withdrawn = sum(not deadlines for deadlines in story.values())
    assert sum("(Preempt)" not in line for line in lines) == withdrawn


def test_the_messages_for_the_user() -> None:
    cluster, lines = Nodes(), list[str]()
    evictions = Evictions(cluster, lines.append)
    cluster.now = {"n1": notice(30.0)}
    evictions.poll(NODES, pace(), 0.0)
    cluster.now = {}
    evictions.poll(NODES, pace(), 10.0)
    cluster.now = {"n1": notice(15.0, "E2")}
    evictions.poll(NODES, None, 12.0)
    assert re.search(r"^gpu-1 .* 30 s \(Preempt\)\..* 26 s, ", lines[0])
    assert re.search(r"\bgpu-1 [^(]*$", lines[1]), "the notice is withdrawn"
    assert re.search(r"^gpu-1 .* 3 s \(Preempt\)[^\d]*$", lines[2])


def test_a_notice_for_the_command_s_own_machine_stops_the_run() -> None:
    """A new group would have no supervisor."""
    cluster, lines = Nodes(), list[str]()
    cluster.own, cluster.now = "n1", {"n1": notice(3.0)}
    assert Evictions(cluster, lines.append).poll(NODES, pace(), 0.0) == "stop"
    assert "run.resume=true" in lines[0]


def test_a_notice_stays_valid_while_the_cluster_does_not_answer() -> None:
    cluster, lines = Nodes(), list[str]()
    evictions = Evictions(cluster, lines.append)
    cluster.now = {"n1": notice(10.0)}
    evictions.poll(NODES, pace(), 0.0)
    cluster.silent = cluster.stubborn = True
    asked = [evictions.poll(NODES, pace(), second / 5) for second in range(50)]
    assert asked.count("regroup") == 1
    assert asked.index("regroup") / 5 == pytest.approx(6.2)
    assert re.search(r"^Ray .*\bhost-1\b", lines[-1])
