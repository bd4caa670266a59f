"""The plan of a run on VMs of the catalogue: what `launch plan cluster.size=SIZE` works out. Nothing is created by it.

Joins the plan of the job with the VMs and what is forecast for them (`launcher.planning.forecast`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.config import Job
from launcher.engine.cost import Link
from launcher.formatting import count, duration, size
from launcher.planning.forecast import (
    ComputeTime,
    Forecast,
    MeasuredMfu,
    candidate_strategies,
    choices,
    computing_of,
    forecast,
    link_between,
    place_workers,
)
from launcher.planning.plan import Placement, Plan, plan_on
from launcher.runs import RunDirectory

if TYPE_CHECKING:
    from launcher.engine.estimate import Estimate


@dataclass(frozen=True)
class Budget:
    """What `cluster.budget_usd` buys: hours of nodes and head, epochs; `enough` for the whole run. None: unknown."""

    usd: float
    hours: float | None
    epochs: float | None
    enough: bool | None


@dataclass(frozen=True)
class NodePlan:
    """What a run on these VMs would be.

    Attributes:
        workers_per_node: workers on each node.
        link: between neighbours of the ring of all workers; None for one worker.
        forecasts: of each strategy that the job may have.
        chosen: the label of what the job would take; best, best_exact: the quickest that fits, of all and of the exact
            ones; None where nothing fits or no time is known.
        seconds_per_epoch, seconds: training alone, with the strategy of the job.
        notes: what has to be known besides, a sentence each.
    """

    plan: Plan
    nodes: Nodes
    workers_per_node: tuple[int, ...]
    link: Link | None
    computing: ComputeTime
    forecasts: tuple[Forecast, ...]
    chosen: str
    best: str | None
    best_exact: str | None
    seconds_per_epoch: float | None
    seconds: float | None
    budget_usd: float | None
    notes: tuple[str, ...]

    @property
    def forecast(self) -> Forecast:
        """That of the strategy that the job would take."""
        return next(one for one in self.forecasts if one.strategy == self.chosen)

    @property
    def usd(self) -> float | None:
        """Of the whole run."""
        return self._dollars(self.seconds)

    def _dollars(self, seconds: float | None) -> float | None:
        rate = self.nodes.usd_per_hour
        return None if seconds is None or rate is None else seconds / 3600 * rate

    @property
    def budget(self) -> Budget | None:
        """What `cluster.budget_usd` buys; None where none is set."""
        if self.budget_usd is None:
            return None
        rate, epoch, usd = self.nodes.usd_per_hour, self._dollars(self.seconds_per_epoch), self.usd
        return Budget(
            usd=self.budget_usd,
            hours=None if rate is None else round(self.budget_usd / rate, 4),
            epochs=None if not epoch else round(self.budget_usd / epoch, 4),
            enough=None if usd is None else usd <= self.budget_usd,
        )

    def to_dict(self) -> dict[str, Any]:
        nodes, usd = self.nodes, self.usd
        prices = [(vm.name, price) for vm, price in ((nodes.size, nodes.node_price), (nodes.head, nodes.head_price))]
        return {
            **self.plan.to_dict(),
            "nodes": {
                "size": nodes.size.name,
                "count": nodes.nodes,
                "gpus": nodes.size.gpus,
                "gpu": nodes.size.gpu,
                "gpu_memory_gib": nodes.size.gpu_memory_gib,
                "vcpus": nodes.size.vcpus,
                "memory_gib": nodes.size.memory_gib,
                "network_gbit": nodes.size.network_gbit,
                "status": nodes.size.status,
                "head_size": nodes.head.name,
                "region": nodes.region,
                "spot": nodes.spot,
                "workers": list(self.workers_per_node),
            },
            "link": None if self.link is None else asdict(self.link),
            "computing": asdict(self.computing),
            "strategies": [asdict(one) for one in self.forecasts],
            "chosen": self.chosen,
            "best": self.best,
            "best_exact": self.best_exact,
            "fits": self.forecast.fits,
            "communication_share": self.forecast.communication_share,
            "seconds_per_step": self.forecast.seconds_per_step,
            "seconds_per_epoch": self.seconds_per_epoch,
            "seconds": self.seconds,
            "nodes_usd_per_hour": nodes.nodes_usd_per_hour,
            "nodes_usd_per_hour_on_demand": nodes.nodes_usd_per_hour_on_demand,
            "head_usd_per_hour": nodes.head_usd_per_hour,
            "usd_per_hour": nodes.usd_per_hour,
            "usd": None if usd is None else round(usd, 4),
            "budget": None if self.budget is None else asdict(self.budget),
            "prices": {name: None if price is None else asdict(price) for name, price in prices},
            "prices_from": nodes.prices_from,
            "quotas": [asdict(one) for one in nodes.quotas()],
            "would_create": nodes.resources(),
            "notes": [*self.plan.notes, *self.notes],
        }


def make_node_plan(job: Job, ask: bool = True, earlier: RunDirectory | None = None) -> NodePlan:
    """Work out what the job would be on the VMs that it asks for.

    Args:
        ask: Azure's public list for today's prices.
        earlier: a run of the same network, whose share of its GPUs' peak is taken where it is known.

    Raises:
        RequestError: the request cannot be met; see `pricing.nodes.nodes_for`, `forecast.place_workers` and
            `engine.estimate`.
    """
    nodes = nodes_for(job.cluster, ask)
    machines, workers_per_node = place_workers(job, nodes)
    from launcher.engine.estimate import estimate

    found = estimate(job, device_sizes=True, workers=machines.workers)
    reached = None
    if earlier is not None and (mfu := (earlier.result().get("metrics") or {}).get("throughput/mfu")):
        reached = MeasuredMfu(earlier.name, float(mfu))
    return node_plan_of(job, nodes, machines, workers_per_node, found, reached)


def node_plan_of(
    job: Job,
    nodes: Nodes,
    machines: Placement,
    workers_per_node: tuple[int, ...],
    found: Estimate,
    reached: MeasuredMfu | None = None,
) -> NodePlan:
    """Join the pieces; see `make_node_plan`. found: with what was looked at ahead."""
    plan, link = plan_on(job, machines, found), link_between(nodes, workers_per_node)
    computing = computing_of(job, nodes, plan, found, reached)
    forecasts = tuple(
        forecast(config, job, nodes, plan, link, computing, found)
        for config in candidate_strategies(job, machines.workers)
    )
    taken, best, best_exact = choices(job, forecasts)
    step = next(one for one in forecasts if one.strategy == taken).seconds_per_step
    batches = plan.batches
    made = NodePlan(
        plan=replace(plan, usd_per_hour=nodes.usd_per_hour or 0.0),
        nodes=nodes,
        workers_per_node=workers_per_node,
        link=link,
        computing=computing,
        forecasts=forecasts,
        chosen=taken,
        best=best,
        best_exact=best_exact,
        seconds_per_epoch=None if step is None else step * batches.steps_per_epoch,
        seconds=None if step is None else step * batches.steps,
        budget_usd=job.cluster.budget_usd,
        notes=(),
    )
    return replace(made, notes=tuple(_notes(job, made)))


def _notes(job: Job, made: NodePlan) -> list[str]:
    """Return what has to be known besides the figures."""
    nodes, computing, batches = made.nodes, made.computing, made.plan.batches
    vm, precision = nodes.size, job.trainer.precision
    found = []
    if not made.forecast.fits:
        found.append(_too_large(made))
    if vm.status == "preview":
        found.append(f"{vm.name} is a preview of Azure.")
    if vm.note:
        found.append(f"{vm.name}: {vm.note}.")
    idle = sum(1 for here in made.workers_per_node if not here)
    if idle:
        found.append(f"{count(idle, 'node')} would have no worker: ask for cluster.nodes={nodes.nodes - idle}.")
    if computing.peak_flops is None:
        found.append(
            f"The {vm.gpu} has no {precision} Tensor cores, so that no time is predicted: trainer.precision=float16 is "
            "what it is quick in."
        )
    elif computing.flops_per_sample is None:
        found.append(
            "No time is predicted: the network has no matrix products that could be counted, and no flops_per_sample."
        )
    elif computing.is_quick and computing.seconds is not None:
        found.append(
            f"A pass computes for {computing.seconds / computing.passes * 1e3:.2g} ms, less than the launching of its "
            "kernels takes: the times here are lower bounds, and a smaller VM may do as well."
        )
    if job.trainer.compile or job.trainer.compile_blocks:
        found.append("A compiled network needs less memory than said here.")
    found += nodes.missing()
    if made.budget is not None and made.budget.enough is False and made.usd is not None:
        found.append(
            f"cluster.budget_usd={made.budget.usd:g} is less than the run would cost, {made.usd:,.2f} USD: it buys "
            f"{made.budget.epochs:.4g} of {count(batches.epochs, 'epoch')}; then the run saves a checkpoint and stops."
        )
    return found


def _too_large(made: NodePlan) -> str:
    from launcher.engine.strategies.kinds.base import kinds

    one = made.forecast
    told = f"It does not fit: with {one.words} a worker needs {size(one.needs)} and may fill {size(one.room)}."
    if one.largest_microbatch > 0:
        return f"{told} It fits with trainer.microbatch_size={one.largest_microbatch}."
    others = [one for one in made.forecasts if one.largest_microbatch > 0]
    if others:
        words = f"{others[0].words} trainer.microbatch_size={others[0].largest_microbatch}"
        return f"{told} It fits with {words}."
    divided = " or ".join(f"strategy={kind.name}" for kind in kinds() if kind.divides)
    return f"{told} Take a size with more memory (`launch sizes`), more nodes with {divided}, or a smaller network."


def format_time(seconds: float | None) -> str:
    """Return a time for people; `unknown` where there is none."""
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else duration(seconds)
