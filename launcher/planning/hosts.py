"""The plan of a run on named hosts (`cluster=ssh`), from what is recorded of them. Connects to nothing.

CPUs and GPUs of a host that `launch up` has seen are known; those of another host are assumed, and the plan states it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from launcher.clusters import base
from launcher.clusters.capacity import Node, worker_capacity
from launcher.clusters.pricing.rates import rate_of
from launcher.config import Job
from launcher.errors import ResourceError
from launcher.formatting import count
from launcher.planning.plan import Plan, place_on, plan_on


@dataclass(frozen=True)
class Seat:
    """One host: its name and address, what it has (None: unknown), and the workers on it. usable: not known as dead."""

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
        has = "CPUs and GPUs unknown" if self.cpus is None else f"{self.cpus:g} CPU, {self.gpus or 0:g} GPU"
        does = count(self.workers, "worker") if self.usable else "left out: it did not answer when it was last asked"
        return f"{self.name} {self.address} ({has}): {does}".replace("  ", " ")


@dataclass(frozen=True)
class HostPlan:
    """What a run on these hosts would be; notes: what is assumed or unknown, a sentence each."""

    plan: Plan
    seats: tuple[Seat, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        hosts = [seat.to_dict() for seat in self.seats]
        cost = {} if self.plan.rate is not None else {"usd_per_hour": None}
        return {**self.plan.to_dict(), **cost, "hosts": hosts, "notes": [*self.plan.notes, *self.notes]}

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as (what, value) for people."""
        unknown = "unknown (cluster.node_usd_per_hour says what a host costs)"
        rows = self.plan.lines()
        if self.plan.rate is None:
            rows = [(what, unknown if what == "cost" else told) for what, told in rows]
        seats = [("head" if place == 0 else "host", seat.describe()) for place, seat in enumerate(self.seats)]
        return [*rows[:2], *seats, *rows[2:], *(("note", note) for note in self.notes)]


def make_host_plan(job: Job) -> HostPlan:
    """Work out what a run on the hosts of the configuration would be.

    Raises:
        RequestError: it cannot be done as asked; see `ClusterKind.known_hosts`, `plan.place_on` and `engine.estimate`.
    """
    kind = base.kind_of(job.cluster)
    entries = kind.known_hosts(job.cluster)
    usable = [entry for entry in entries if entry.get("state") != "dead"]
    if not usable:
        raise ResourceError(
            f"None of the hosts {', '.join(entry['name'] for entry in entries)} answered when they were last asked, so "
            "that there is nothing to plan for. `launch up` asks them again."
        )
    nodes = _nodes(job, usable)
    where = f"{count(len(nodes), 'host')} of cluster={kind.name}: {', '.join(node.host for node in nodes)}"
    machines = place_on(job, nodes, where, kind.name)

    from launcher.engine.estimate import estimate

    rate = rate_of(job.cluster, len(nodes))
    plan = plan_on(job, machines, estimate(job, workers=machines.workers))
    if rate is not None:
        plan = replace(plan, rate=rate, usd_per_hour=round(rate.usd_per_hour(), 6))
    workers_per_node = _sits(plan, nodes)
    seats = tuple(_seat(entry, workers_per_node.get(entry["name"], 0), entry in usable) for entry in entries)
    return HostPlan(plan, seats, tuple(_notes(usable, nodes, plan)))


def _seat(entry: dict[str, Any], workers: int, usable: bool) -> Seat:
    return Seat(entry["name"], entry.get("address") or "", entry.get("cpus"), entry.get("gpus"), workers, usable)


def _nodes(job: Job, entries: list[dict[str, Any]]) -> list[Node]:
    """Return the hosts as nodes; an unknown host has exactly the capacity for its share of the workers."""
    scaling = job.scaling
    unseen = sum(entry.get("cpus") is None for entry in entries)
    wants_gpu = scaling.device == "cuda"
    each_gpu = (1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker) if wants_gpu else 0.0
    seen = [_node(entry) for entry in entries if entry.get("cpus") is not None]
    usual = len(entries) if wants_gpu else 2  # what scaling.workers=auto comes to
    asked = usual if scaling.workers == "auto" else scaling.workers
    left = max(0, asked - int(worker_capacity(seen, scaling.cpus_per_worker, each_gpu)))
    share = max(1, math.ceil(left / unseen)) if unseen else 0
    cpus, gpus = max(1.0, share * scaling.cpus_per_worker), float(math.ceil(share * each_gpu))
    return [
        _node(entry) if entry.get("cpus") is not None else Node("", entry["name"], "", cpus, gpus) for entry in entries
    ]


def _node(entry: dict[str, Any]) -> Node:
    return Node("", entry["name"], entry.get("address") or "", float(entry["cpus"]), float(entry.get("gpus") or 0))


def _sits(plan: Plan, nodes: list[Node]) -> dict[str, int]:
    """Return the workers of each host: host after host is filled, as Ray packs them."""
    machines, left = plan.machines, plan.machines.workers
    workers_per_node = {}
    for node in nodes:
        fits = worker_capacity([node], machines.cpus_per_worker, machines.gpus_per_worker)
        workers_per_node[node.host] = int(min(left, fits))
        left -= workers_per_node[node.host]
    return workers_per_node


def _notes(usable: list[dict[str, Any]], nodes: list[Node], plan: Plan) -> list[str]:
    notes = ["Nothing was connected to. Ray may seat the workers otherwise where something else runs on the hosts."]
    assumed = {entry["name"] for entry in usable if entry.get("cpus") is None}
    if assumed:
        one = next(node for node in nodes if node.host in assumed)
        notes.append(
            f"Of {', '.join(sorted(assumed))} nothing is known before `launch up`. Assumed are {one.cpus:g} CPU and "
            f"{one.gpus:g} GPU each, as many as the workers need; where a host has more, Ray puts more workers on it."
        )
        if plan.machines.device == "cpu":
            notes.append(
                "With GPUs there, scaling.workers=auto is one worker for each GPU; scaling.device=cuda plans for that."
            )
    return notes
