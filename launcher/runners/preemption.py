"""Reacts to a notice that a machine of a run is about to be evicted.

`launcher.clusters.eviction` writes notices to the cluster's key-value store. Kubernetes, an autoscaler, or a SIGTERM to
`ray start --block` can also make Ray drain a node. The driver checks for both every second, reports the notice, and
continues to use the machine, since the notice may be withdrawn. As late as is safe, it drains the node, so that no new
group is placed on it, and requests a checkpoint and a regroup from the workers. They complete their current step first,
so no step is repeated.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import ray

from launcher.clusters import eviction
from launcher.clusters.eviction import Notice
from launcher.ray_seam import kv, private
from launcher.runners.worker_errors import Event

LOOK_SECONDS = 1.0
RPC_SECONDS = 2.0
# A request takes up to 0.3 s to reach the workers, the driver polls five times a second, and clocks differ slightly.
MARGIN_SECONDS = 3.0
SAVES = 1.5  # the expected time of a save, relative to the longest of the last ones
# Machines that are evicted so soon after the first are drained with it: one regroup instead of several.
TOGETHER_SECONDS = 30.0


def seconds_needed(pace: Event | None) -> float:
    """Return how many seconds before a deadline the request must be sent to the workers.

    Workers answer a request after the current step and the next one, or after an evaluation. If the time of a save is
    unknown, the result is infinity, so that the request is sent at once.

    Args:
        pace: the engine's event of that name (`launcher.engine.pace`).
    """
    if pace is None or pace["save_seconds"] is None:
        return float("inf")
    return MARGIN_SECONDS + 2 * pace["step_seconds"] + pace["evaluation_seconds"] + SAVES * pace["save_seconds"]


class Cluster(Protocol):
    """Access to the notices of a cluster. Node ids are Ray's. Both methods may raise any exception."""

    own: str  # the id of the node of this process

    def notices(self) -> dict[str, Notice]: ...

    def drain(self, node: str, notice: Notice) -> None: ...


class Evictions:
    """Handles the notices for the machines of one run.

    Args:
        report: called with lines for the user.
    """

    def __init__(self, cluster: Cluster, report: Callable[[str], None]) -> None:
        self._cluster, self._report = cluster, report
        self._known: dict[str, Notice] = {}
        self._reported: set[tuple[str, str]] = set()
        self._drained: set[str] = set()
        self._next = 0.0

    def poll(self, nodes: Mapping[str, str], pace: Event | None, now: float) -> Literal["regroup", "stop"] | None:
        """Return the request that must be sent to the workers now. Call it often: it asks the cluster every second.

        Args:
            nodes: the nodes of this run's workers: node id -> host name.
            pace: the newest event `pace` of the engine.
            now: seconds since the epoch.
        """
        if now >= self._next:
            self._next = now + LOOK_SECONDS
            with contextlib.suppress(Exception):  # if the head does not answer, the known notices stay valid
                self._update(self._cluster.notices(), nodes, pace, now)
        pending = {node: self._known[node] for node in nodes if node in self._known and node not in self._drained}
        due = [notice for notice in pending.values() if now >= notice.deadline - seconds_needed(pace)]
        if not due:
            return None
        horizon = max(notice.deadline for notice in due) + TOGETHER_SECONDS
        leaving = {node: notice for node, notice in pending.items() if notice.deadline <= horizon}
        for node, notice in leaving.items():
            self._drained.add(node)
            try:
                self._cluster.drain(node, notice)
            except Exception as error:
                self._report(f"Ray does not drain {nodes[node]} ({error}), so new workers may be placed on it.")
        return "stop" if self._cluster.own in leaving else "regroup"

    def _update(self, notices: dict[str, Notice], nodes: Mapping[str, str], pace: Event | None, now: float) -> None:
        for node, notice in notices.items():
            if node in nodes and (node, notice.event) not in self._reported:
                self._reported.add((node, notice.event))
                self._report(self._announcement(node, notice, nodes[node], now, seconds_needed(pace)))
        for node, notice in self._known.items():
            if node in nodes and node not in notices and node not in self._drained:
                self._report(f"The eviction of {notice.vm or nodes[node]} was withdrawn. The run continues unchanged.")
        self._known = notices

    def _announcement(self, node: str, notice: Notice, host: str, now: float, needed: float) -> str:
        left = notice.deadline - now
        when = (
            f"at {time.strftime('%H:%M:%S', time.localtime(notice.deadline))}, in {left:.0f} s" if left > 0 else "now"
        )
        then = "continues without it"
        if node == self._cluster.own:
            then = "stops, because this command runs on it. Continue it on another machine with run.resume=true"
        wait = left - needed
        start = "saves a checkpoint now"
        if wait > 0:
            start = f"saves a checkpoint in {wait:.0f} s, unless the eviction is withdrawn,"
        return f"{notice.vm or host} will be evicted {when} ({notice.kind}). The run {start} and {then}."


class RayCluster:
    """The Ray cluster to which this process is connected."""

    def __init__(self) -> None:
        self._client: Any = private.own_gcs_client()
        self.own = ray.get_runtime_context().get_node_id()

    def notices(self) -> dict[str, Notice]:
        """Return the published notices, and a notice for each node that Ray drains for another reason, by node id."""
        client = self._client
        found: dict[str, Notice] = {}
        for node, deadline in private.draining_nodes(client, RPC_SECONDS).items():
            # Without a deadline the node ends as soon as it is idle; the notice is due at once.
            found[node] = Notice("", "drained by Ray", deadline, "drain")
        for key in kv.keys(eviction.PREFIX, client, RPC_SECONDS):
            with contextlib.suppress(ValueError, TypeError):  # not a notice, or withdrawn
                text = kv.get(key, client, RPC_SECONDS)
                found[key.removeprefix(eviction.PREFIX)] = Notice.of_json(text or "")
        return found

    def drain(self, node: str, notice: Notice) -> None:
        eviction.drain(self._client, node, notice)
