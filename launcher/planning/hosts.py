"""The plan of a run on named hosts (`cluster=ssh`), from their records. Opens no connection.

The CPUs and GPUs of a host are known after `launch up`. Before that they are assumed, and the plan has a note about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from launcher.clusters import base
from launcher.clusters.capacity import Node, worker_capacity
from launcher.clusters.pricing.rates import rate_of
from launcher.config import Job
from launcher.engine.estimate import estimate
from launcher.errors import ResourceError
from launcher.formatting import count
from launcher.planning.plan import Plan, place_on, plan_on


@dataclass(frozen=True)
class Seat:
    """One host and its workers.

    Attributes:
        name, address: of the host.
        cpus, gpus: its resources; None if unknown.
        workers: the number of workers on it.
        usable: whether it answered when it was last contacted.
    """

    name: str
    address: str
    cpus: float | None
    gpus: float | None
    workers: int
    usable: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "address": self.address or None,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "workers": self.workers,
            "usable": self.usable,
        }

    def describe(self) -> str:
        """Return a description of the host in one line."""
        resources = "CPUs and GPUs unknown" if self.cpus is None else f"{self.cpus:g} CPU, {self.gpus or 0:g} GPU"
        workers = count(self.workers, "worker") if self.usable else "not used: it did not answer the last connection"
        return f"{self.name} {self.address} ({resources}): {workers}".replace("  ", " ")


@dataclass(frozen=True)
class HostPlan:
    """The plan of a run on hosts. notes: assumptions and unknown facts, one sentence each."""

    plan: Plan
    seats: tuple[Seat, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        hosts = [seat.to_dict() for seat in self.seats]
        cost = {} if self.plan.rate is not None else {"usd_per_hour": None}
        return {**self.plan.to_dict(), **cost, "hosts": hosts, "notes": [*self.plan.notes, *self.notes]}

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of label and text."""
        unknown = "unknown (set cluster.node_usd_per_hour to the cost of a host)"
        rows = self.plan.lines()
        if self.plan.rate is None:
            rows = [(label, unknown if label == "cost" else text) for label, text in rows]
        seats = [("head" if place == 0 else "host", seat.describe()) for place, seat in enumerate(self.seats)]
        return [*rows[:2], *seats, *rows[2:], *(("note", note) for note in self.notes)]


def make_host_plan(job: Job) -> HostPlan:
    """Return the plan of a job on the hosts of its configuration.

    Raises:
        RequestError: the request cannot be met; see `ClusterKind.known_hosts`, `plan.place_on` and `engine.estimate`.
    """
    kind = base.kind_of(job.cluster)
    entries = kind.known_hosts(job.cluster)
    usable = [entry for entry in entries if entry.get("state") != "dead"]
    if not usable:
        raise ResourceError(
            f"None of the hosts {', '.join(entry['name'] for entry in entries)} answered the last connection, so no "
            "host is available for the plan. Run `launch up` to connect to them again."
        )
    nodes = _nodes(job, usable)
    where = f"{count(len(nodes), 'host')} of cluster={kind.name}: {', '.join(node.host for node in nodes)}"
    machines = place_on(job, nodes, where, kind.name)

    rate = rate_of(job.cluster, len(nodes))
    plan = plan_on(job, machines, estimate(job, workers=machines.workers))
    if rate is not None:
        plan = replace(plan, rate=rate, usd_per_hour=round(rate.usd_per_hour(), 6))
    workers_by_host = _workers_by_host(plan, nodes)
    seats = tuple(_seat(entry, workers_by_host.get(entry["name"], 0), entry in usable) for entry in entries)
    return HostPlan(plan, seats, tuple(_notes(usable, nodes, plan)))


def _seat(entry: dict[str, Any], workers: int, usable: bool) -> Seat:
    return Seat(entry["name"], entry.get("address") or "", entry.get("cpus"), entry.get("gpus"), workers, usable)


def _nodes(job: Job, entries: list[dict[str, Any]]) -> list[Node]:
    """Return the hosts as nodes. An unknown host is assumed to have the capacity for its share of the workers."""
    scaling = job.scaling
    unknown = sum(entry.get("cpus") is None for entry in entries)
    use_gpu = scaling.device == "cuda"
    each_gpu = (1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker) if use_gpu else 0.0
    known = [_node(entry) for entry in entries if entry.get("cpus") is not None]
    automatic = len(entries) if use_gpu else 2  # the number of workers of scaling.workers=auto
    requested = automatic if scaling.workers == "auto" else scaling.workers
    left = max(0, requested - int(worker_capacity(known, scaling.cpus_per_worker, each_gpu)))
    share = max(1, math.ceil(left / unknown)) if unknown else 0
    cpus, gpus = max(1.0, share * scaling.cpus_per_worker), float(math.ceil(share * each_gpu))
    return [
        _node(entry) if entry.get("cpus") is not None else Node("", entry["name"], "", cpus, gpus) for entry in entries
    ]


def _node(entry: dict[str, Any]) -> Node:
    return Node("", entry["name"], entry.get("address") or "", float(entry["cpus"]), float(entry.get("gpus") or 0))


def _workers_by_host(plan: Plan, nodes: list[Node]) -> dict[str, int]:
    """Return the number of workers on each host. One host after another is filled, as Ray does."""
    machines, left = plan.machines, plan.machines.workers
    workers_by_host = {}
    for node in nodes:
        fits = worker_capacity([node], machines.cpus_per_worker, machines.gpus_per_worker)
        workers_by_host[node.host] = int(min(left, fits))
        left -= workers_by_host[node.host]
    return workers_by_host


def _notes(usable: list[dict[str, Any]], nodes: list[Node], plan: Plan) -> list[str]:
    notes = ["No connection was opened. Ray may place the workers differently if the hosts run other jobs."]
    assumed = {entry["name"] for entry in usable if entry.get("cpus") is None}
    if assumed:
        one = next(node for node in nodes if node.host in assumed)
        notes.append(
            f"The resources of {', '.join(sorted(assumed))} are unknown before `launch up`. The plan assumes "
            f"{one.cpus:g} CPU and {one.gpus:g} GPU each, as many as the workers need. If a host has more, Ray places "
            "more workers on it."
        )
        if plan.machines.device == "cpu":
            notes.append(
                "If the hosts have GPUs, scaling.workers=auto is one worker per GPU. Plan for this with "
                "scaling.device=cuda."
            )
    return notes
