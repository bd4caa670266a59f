"""What a run does about the notice that one of its machines is to be taken away.

`launcher.clusters.eviction` puts notices into the cluster's key-value store; somebody else (Kubernetes, `ray start
--block` that gets a SIGTERM, an autoscaler) may have Ray drain a node. The driver looks for both each second, tells the
user, and waits: the machine works on, and the notice may be withdrawn. As late as is safe the node is drained, so that
no new group is placed there, and the workers are asked to save and to regroup: they do so after the step that they are
in, which is why no step is done twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from launcher.clusters import eviction
from launcher.clusters.eviction import Notice
from launcher.ray_seam import kv, private
from launcher.runners.worker_errors import Event

LOOK_SECONDS = 1.0
RPC_SECONDS = 2.0
# The request takes up to 0.3 s to the workers, the driver looks five times a second, clocks differ a little; and a
# slow machine is slow just then.
MARGIN_SECONDS = 3.0
SAVES = 1.5  # times as long as the longest of the last saves
# Machines that are to go so soon after the first are left together with it: one regroup instead of several.
TOGETHER_SECONDS = 30.0


def seconds_needed(pace: Event | None) -> float:
    """Return how long before a deadline the workers have to be asked.

    A request that comes while a step begins is answered after the next one, or after an evaluation that comes first.
    Where nobody knows how long a save takes, there is no time to lose: infinity.

    Args:
        pace: the engine's event of that name (`launcher.engine.pace`).
    """
    if pace is None or pace["save_seconds"] is None:
        return float("inf")
    return MARGIN_SECONDS + 2 * pace["step_seconds"] + pace["evaluation_seconds"] + SAVES * pace["save_seconds"]


class Cluster(Protocol):
    """What is known of the nodes, by their Ray ids. Both may raise."""

    own: str  # the node of this process

    def notices(self) -> dict[str, Notice]: ...

    def drain(self, node: str, notice: Notice) -> None: ...


class Evictions:
    """The notices for the machines of one run.

    Args:
        tell: takes one line for the user.
    """

    def __init__(self, cluster: Cluster, tell: Callable[[str], None]) -> None:
        self._cluster, self._tell = cluster, tell
        self._known: dict[str, Notice] = {}
        self._told: set[tuple[str, str]] = set()
        self._left: set[str] = set()
        self._next = 0.0

    def look(self, nodes: Mapping[str, str], pace: Event | None, now: float) -> Literal["regroup", "stop"] | None:
        """Return what the workers must be asked for now. Call it often; the cluster is asked once a second.

        Args:
            nodes: where this run's workers are: Ray's node id -> host name.
            pace: the newest event `pace`.
            now: seconds since the epoch.
        """
        if now >= self._next:
            self._next = now + LOOK_SECONDS
            with contextlib.suppress(Exception):  # the head is busy or away: what is known stays, and is asked again
                self._take(self._cluster.notices(), nodes, pace, now)
        open_ones = {node: self._known[node] for node in nodes if node in self._known and node not in self._left}
        due = [notice for notice in open_ones.values() if now >= notice.deadline - seconds_needed(pace)]
        if not due:
            return None
        horizon = max(notice.deadline for notice in due) + TOGETHER_SECONDS
        leaving = {node: notice for node, notice in open_ones.items() if notice.deadline <= horizon}
        for node, notice in leaving.items():
            self._left.add(node)
            try:
                self._cluster.drain(node, notice)
            except Exception as error:
                self._tell(f"Ray does not drain {nodes[node]} ({error}): new workers may be placed there.")
        return "stop" if self._cluster.own in leaving else "regroup"

    def _take(self, notices: dict[str, Notice], nodes: Mapping[str, str], pace: Event | None, now: float) -> None:
        for node, notice in notices.items():
            if node in nodes and (node, notice.event) not in self._told:
                self._told.add((node, notice.event))
                self._tell(self._announcement(node, notice, nodes[node], now, seconds_needed(pace)))
        for node, notice in self._known.items():
            if node in nodes and node not in notices and node not in self._left:
                self._tell(f"The notice for {notice.vm or nodes[node]} is withdrawn; nothing was done because of it.")
        self._known = notices

    def _announcement(self, node: str, notice: Notice, host: str, now: float, needed: float) -> str:
        left = notice.deadline - now
        when = (
            f"at {time.strftime('%H:%M:%S', time.localtime(notice.deadline))}, in {left:.0f} s" if left > 0 else "now"
        )
        then = "goes on without it"
        if node == self._cluster.own:
            then = "stops, since this command runs there too; continue it elsewhere with run.resume=true"
        wait = left - needed
        start = "The run saves now" if wait <= 0 else f"The run saves in {wait:.0f} s, unless that is withdrawn before,"
        return f"{notice.vm or host} is to be taken away {when} ({notice.kind}). {start} and {then}."


class RayCluster:
    """The Ray that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._client: Any = private.own_gcs_client()
        self.own = ray.get_runtime_context().get_node_id()

    def notices(self) -> dict[str, Notice]:
        """Return the published notices, and a notice for each node that Ray drains for another reason."""
        client = self._client
        found: dict[str, Notice] = {}
        for node, deadline in private.draining_nodes(client, RPC_SECONDS).items():
            # Without a deadline the node ends as soon as nothing runs on it: whenever we like, so at once.
            found[node] = Notice("", "drained by Ray", deadline, "drain")
        for key in kv.keys(eviction.PREFIX, client, RPC_SECONDS):
            with contextlib.suppress(ValueError, TypeError):  # somebody else's, or taken back since
                text = kv.get(key, client, RPC_SECONDS)
                found[key.removeprefix(eviction.PREFIX)] = Notice.of_json(text or "")
        return found

    def drain(self, node: str, notice: Notice) -> None:
        eviction.drain(self._client, node, notice)
