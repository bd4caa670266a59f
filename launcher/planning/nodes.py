"""The plan of a run on VMs of the catalogue, for `launch plan cluster.size=SIZE`. Creates nothing.

It combines the plan of the job with the VMs and the forecasts for them (`launcher.planning.forecast`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.config import Job
from launcher.engine.cost import Link
from launcher.engine.estimate import Estimate, estimate
from launcher.engine.strategies.kinds.base import kinds
from launcher.formatting import count, duration, size
from launcher.planning.forecast import (
    ASSUMED_GBIT,
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


@dataclass(frozen=True)
class Budget:
    """The hours and epochs that `cluster.budget_usd` pays for, and whether it is enough for the run. None: unknown."""

    usd: float
    hours: float | None
    epochs: float | None
    enough: bool | None


@dataclass(frozen=True)
class NodePlan:
    """The plan of a run on VMs.

    Attributes:
        plan: the plan of the job.
        nodes: the VMs.
        workers_per_node: the number of workers on each node.
        link: the link between neighbours in the ring of all workers; None for one worker.
        computing: the computing time of a worker per step.
        forecasts: memory and time of each strategy that the job can use.
        chosen: the label of the job's strategy.
        best, best_exact: the labels of the fastest strategy that fits, of all and of the exact ones; None if none fits
            or no time is known.
        seconds_per_epoch, seconds: the training time with the job's strategy, without evaluation.
        budget_usd: `cluster.budget_usd`, or None.
        notes: further facts, one sentence each.
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
        """Return the forecast of the job's strategy."""
        return next(one for one in self.forecasts if one.strategy == self.chosen)

    @property
    def usd(self) -> float | None:
        """Return the cost of the whole run in US dollars, or None if it is unknown."""
        return self._dollars(self.seconds)

    def _dollars(self, seconds: float | None) -> float | None:
        rate = self.nodes.usd_per_hour
        return None if seconds is None or rate is None else seconds / 3600 * rate

    @property
    def budget(self) -> Budget | None:
        """Return what `cluster.budget_usd` pays for; None if no budget is set."""
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
    """Return the plan of a job on the VMs of its configuration.

    Args:
        ask: whether to query Azure's public price list for today's prices.
        earlier: a run of the same model. If it recorded `throughput/mfu`, the plan uses that value.

    Raises:
        RequestError: the request cannot be met; see `pricing.nodes.nodes_for`, `forecast.place_workers` and
            `engine.estimate`.
    """
    nodes = nodes_for(job.cluster, ask)
    machines, workers_per_node = place_workers(job, nodes)
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
    """Combine the parts of a plan; see `make_node_plan`. found: the engine's estimate, with `device_sizes`."""
    plan, link = plan_on(job, machines, found), link_between(nodes, workers_per_node)
    computing = computing_of(job, nodes, plan, found, reached)
    forecasts = tuple(
        forecast(config, job, nodes, plan, link, computing, found)
        for config in candidate_strategies(job, machines.workers)
    )
    chosen, best, best_exact = choices(job, forecasts)
    step = next(one for one in forecasts if one.strategy == chosen).seconds_per_step
    batches = plan.batches
    node_plan = NodePlan(
        plan=replace(plan, usd_per_hour=nodes.usd_per_hour or 0.0),
        nodes=nodes,
        workers_per_node=workers_per_node,
        link=link,
        computing=computing,
        forecasts=forecasts,
        chosen=chosen,
        best=best,
        best_exact=best_exact,
        seconds_per_epoch=None if step is None else step * batches.steps_per_epoch,
        seconds=None if step is None else step * batches.steps,
        budget_usd=job.cluster.budget_usd,
        notes=(),
    )
    return replace(node_plan, notes=tuple(_notes(job, node_plan)))


def _notes(job: Job, node_plan: NodePlan) -> list[str]:
    """Return facts that the figures do not show, one sentence each."""
    nodes, computing, batches = node_plan.nodes, node_plan.computing, node_plan.plan.batches
    vm, precision = nodes.size, job.trainer.precision
    found = []
    if not node_plan.forecast.fits:
        found.append(_too_large(node_plan))
    if vm.status == "preview":
        found.append(f"{vm.name} is a preview size.")
    if vm.note:
        found.append(f"{vm.name}: {vm.note}.")
    if vm.network_gbit is None and node_plan.link is not None and nodes.nodes > 1:
        found.append(
            f"The network bandwidth of {vm.name} is unknown. The plan assumes {ASSUMED_GBIT:g} Gbit/s, the "
            "lowest of the catalogue."
        )
    idle = node_plan.workers_per_node.count(0)
    if idle:
        found.append(f"{count(idle, 'node')} would have no worker. Set cluster.nodes={nodes.nodes - idle}.")
    if computing.peak_flops is None:
        found.append(
            f"No time is predicted, because the {vm.gpu} has no {precision} Tensor cores. Use "
            "trainer.precision=float16, which is fast on this GPU."
        )
    elif computing.flops_per_sample is None:
        found.append("No time is predicted, because the model has no matrix products to count and no flops_per_sample.")
    elif computing.is_launch_bound and computing.seconds is not None:
        found.append(
            f"A pass computes for {computing.seconds / computing.passes * 1e3:.2g} ms, less than the time to launch "
            "its kernels. The times are lower bounds, and a smaller VM may suffice."
        )
    if job.trainer.compile or job.trainer.compile_blocks:
        found.append("A compiled model needs less memory than this estimate.")
    found += nodes.missing()
    budget, usd = node_plan.budget, node_plan.usd
    if budget is not None and budget.enough is False and usd is not None:
        found.append(
            f"cluster.budget_usd={budget.usd:g} is less than the cost of the run, {usd:,.2f} USD. It pays for "
            f"{budget.epochs:.4g} of {count(batches.epochs, 'epoch')}; then the run saves a checkpoint and stops."
        )
    return found


def _too_large(node_plan: NodePlan) -> str:
    one = node_plan.forecast
    problem = f"The run does not fit: with {one.words} a worker needs {size(one.needs)} and may use {size(one.room)}."
    if one.largest_microbatch > 0:
        return f"{problem} It fits with trainer.microbatch_size={one.largest_microbatch}."
    others = [one for one in node_plan.forecasts if one.largest_microbatch > 0]
    if others:
        words = f"{others[0].words} trainer.microbatch_size={others[0].largest_microbatch}"
        return f"{problem} It fits with {words}."
    divided = " or ".join(f"strategy={kind.name}" for kind in kinds() if kind.divides)
    return f"{problem} Use a size with more memory (`launch sizes`), more nodes with {divided}, or a smaller model."


def format_time(seconds: float | None) -> str:
    """Return a duration as text, such as `85 ms` or `4m21s`; `unknown` for None."""
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else duration(seconds)
