"""The text of a plan on VMs of the catalogue: lines, then tables."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from launcher.clusters.pricing.catalogue import Price
from launcher.formatting import count, size
from launcher.planning.nodes import NodePlan, format_time


def text(node_plan: NodePlan, run: str, width: int) -> str:
    """Return the plan as text. run: the run directory; width: of the terminal, in characters."""
    out = Console(file=io.StringIO(), width=width, highlight=False, emoji=False, markup=False)
    rows = [("run", run), *_lines(node_plan)]
    room = f"{size(node_plan.forecast.room)} of {node_plan.nodes.size.device_memory_gib:g} GiB"
    out.print(_pairs(rows))
    # Printed as separate lines, since the title of a table would be wrapped at the width of the table.
    out.print(f"\nA worker may use {room} of GPU memory. * marks the job's strategy; wait is the time for the link.")
    out.print(_strategies(node_plan))
    out.print(_time(node_plan))
    out.print(f"\n{node_plan.nodes.prices_from}")
    out.print(_money(node_plan))
    out.print(f"Quota needed in {node_plan.nodes.region}")
    out.print(_quotas(node_plan))
    out.print("Resources of the cluster (this command creates none)")
    out.print(_created(node_plan))
    for note in node_plan.notes:
        out.print(f"- {note}")
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def _pairs(rows: list[tuple[str, str]]) -> Any:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _table(*headings: str, numbers: tuple[str, ...] = ()) -> Any:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        grid.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return grid


def _lines(node_plan: NodePlan) -> list[tuple[str, str]]:
    nodes, plan = node_plan.nodes, node_plan.plan
    vm, head = nodes.size, nodes.head
    kind = {True: "spot", False: "on demand", "prefer": "spot, or on demand if there is no capacity"}[nodes.spot]
    machine = f"{vm.hardware}, {vm.vcpus} vCPU, {vm.memory_gib} GiB"
    network = f", {vm.network_gbit:g} Gbit/s" if vm.network_gbit else ""
    replaced = {"where", "workers", "memory per worker", "communication", "cost", "strategy"}
    return [
        ("nodes", f"{nodes.nodes} x {vm.name} ({machine}{network}) in {nodes.region}, {kind}"),
        ("head", f"{head.name} ({head.vcpus} vCPU, {head.memory_gib} GiB), on demand"),
        ("workers", _placement(node_plan)),
        *(pair for pair in plan.lines() if pair[0] not in replaced),
        ("gradients", f"{size(plan.gradient_bytes_per_step)} per step with {node_plan.chosen}"),
        ("link", _link(node_plan)),
    ]


def _placement(node_plan: NodePlan) -> str:
    """Return the placement of the workers, such as `2 on each of 4 nodes`."""
    machines, numbers = node_plan.plan.machines, node_plan.workers_per_node
    groups = [(workers, numbers.count(workers)) for workers in dict.fromkeys(numbers) if workers]
    placed = ", ".join(
        f"{workers} on each of {nodes} nodes" if nodes > 1 else f"{workers} on one node" for workers, nodes in groups
    )
    return f"{placed} ({machines.cpus_per_worker:g} CPU and {machines.gpus_per_worker:g} GPU each)"


def _link(node_plan: NodePlan) -> str:
    if node_plan.link is None:
        return "none: one worker"
    rate = (
        f"{node_plan.link.bandwidth * 8 / 1e9:.3g} Gbit/s, {node_plan.link.latency * 1e6:.0f} us from worker to worker"
    )
    if sum(1 for workers in node_plan.workers_per_node if workers) > 1:
        return f"{rate} (assumed: 94 % of the network bandwidth)"
    return f"{rate} (assumed: half the bandwidth of PCI Express {node_plan.nodes.size.pcie}; no network between VMs)"


def _strategies(node_plan: NodePlan) -> Any:
    numbers = ("memory", "max microbatch", "sent per step", "step", "wait")
    grid = _table("strategy", "memory", "fits", *numbers[1:], numbers=numbers)
    for one in node_plan.forecasts:
        grid.add_row(
            ("* " if one.strategy == node_plan.chosen else "  ") + one.strategy.replace("compression=", ""),
            size(one.needs),
            "yes" if one.fits else "no",
            f"{one.largest_microbatch:,}",
            size(one.bytes_per_step) if one.bytes_per_step else "",
            format_time(one.seconds_per_step),
            "unknown" if one.communication_share is None else f"{one.communication_share:.0%}",
        )
    return grid


def _time(node_plan: NodePlan) -> Any:
    parts = ", ".join(f"{what} {size(part)}" for what, part in node_plan.forecast.memory.items())
    rows = [("memory per worker", parts), ("fastest that fits", _best(node_plan)), ("computing", _computing(node_plan))]
    if node_plan.seconds is not None:
        each, whole = format_time(node_plan.seconds_per_epoch), format_time(node_plan.seconds)
        total = f"{each} per epoch, {whole} for {count(node_plan.plan.batches.steps, 'step')}"
        rows.append(("time", f"{total}; excludes the start of the VMs (minutes), data loading and evaluation"))
    return _pairs(rows)


def _best(node_plan: NodePlan) -> str:
    if node_plan.best is None:
        return "unknown" if node_plan.forecast.fits else "none of these fits"
    if node_plan.computing.is_launch_bound:
        return "cannot be determined from lower bounds, see below"
    exclusion = " (excludes the time to compress)" if "powersgd" in node_plan.best else ""
    if node_plan.best == node_plan.best_exact or node_plan.best_exact is None:
        return f"{node_plan.best}{exclusion}"
    return (
        f"{node_plan.best}{exclusion}; with the same losses as one worker: {node_plan.best_exact} (docs/exactness.md)"
    )


def _computing(node_plan: NodePlan) -> str:
    computing = node_plan.computing
    if computing.seconds is None or computing.flops_per_sample is None or computing.peak_flops is None:
        return "unknown"
    origin = "defined by the model" if computing.flops_from == "the model" else "counted in its matrix products"
    reached = "assumed at" if computing.mfu_from == "assumed" else f"as reached by {computing.mfu_from},"
    return (
        f"{format_time(computing.seconds)} per step: {computing.flops_per_sample / 1e9:,.4g} GFLOP per sample "
        f"({origin}), {reached} {computing.mfu:.0%} "
        f"of the {node_plan.nodes.size.gpu}'s {computing.peak_flops / 1e12:.4g} TFLOP/s"
    )


def _money(node_plan: NodePlan) -> Any:
    nodes = node_plan.nodes
    grid = _table("cost", "USD/h", "unit price", numbers=("USD/h",))
    price = "spot" if nodes.spot is not False else "on demand"
    label = f"{count(nodes.nodes, 'node')}, {price}"
    grid.add_row(label, _dollars(nodes.nodes_usd_per_hour), _source(nodes.node_price))
    if nodes.spot == "prefer":
        on_demand = nodes.size.price(nodes.region)
        grid.add_row("or on demand", _dollars(nodes.nodes_usd_per_hour_on_demand), _source(on_demand))
    grid.add_row("head", _dollars(nodes.head_usd_per_hour), _source(nodes.head_price))
    grid.add_row("total", _dollars(nodes.usd_per_hour), "without disks, addresses and traffic")
    if node_plan.usd is not None:
        grid.add_row("the run", f"{node_plan.usd:,.2f} USD", format_time(node_plan.seconds))
    if node_plan.budget is not None:
        paid = [(node_plan.budget.hours, "hour"), (node_plan.budget.epochs, "epoch")]
        amounts = " or ".join(count(float(f"{number:.4g}"), unit) for number, unit in paid if number is not None)
        grid.add_row("budget", f"{node_plan.budget.usd:,.2f} USD", f"pays for {amounts}" if amounts else "")
    return grid


def _dollars(usd: float | None) -> str:
    return "unknown" if usd is None else f"{usd:,.3f}"


def _source(price: Price | None) -> str:
    return "" if price is None else f"{price.usd_per_hour:.3f} from {price.source}, {price.date}"


def _quotas(node_plan: NodePlan) -> Any:
    grid = _table("family", "vCPUs", "for", numbers=("vCPUs",))
    for one in node_plan.nodes.quotas():
        grid.add_row(one.name, str(one.vcpus), one.what)
    return grid


def _created(node_plan: NodePlan) -> Any:
    grid = _table("resource", "number", "", numbers=("number",))
    for one in node_plan.nodes.resources():
        grid.add_row(one["kind"], str(one["count"]), one["what"])
    return grid
