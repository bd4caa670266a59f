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


def text(made: NodePlan, run: str, width: int) -> str:
    """Return the plan as text. run: the run directory; width: of the terminal, in characters."""
    out = Console(file=io.StringIO(), width=width, highlight=False, emoji=False, markup=False)
    rows = [("run", run), *_lines(made)]
    room = f"{size(made.forecast.room)} of {made.nodes.size.device_memory_gib:g} GiB"
    out.print(_pairs(rows))
    # Printed as separate lines, since the title of a table would be wrapped at the width of the table.
    out.print(f"\nA worker may use {room} of GPU memory. * marks the job's strategy; wait is the time for the link.")
    out.print(_strategies(made))
    out.print(_time(made))
    out.print(f"\n{made.nodes.prices_from}")
    out.print(_money(made))
    out.print(f"Quota needed in {made.nodes.region}")
    out.print(_quotas(made))
    out.print("Resources of the cluster (this command creates none)")
    out.print(_created(made))
    for note in made.notes:
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


def _lines(made: NodePlan) -> list[tuple[str, str]]:
    nodes, plan = made.nodes, made.plan
    vm, head = nodes.size, nodes.head
    kind = {True: "spot", False: "on demand", "prefer": "spot, or on demand if there is no capacity"}[nodes.spot]
    machine = f"{vm.hardware}, {vm.vcpus} vCPU, {vm.memory_gib} GiB"
    network = f", {vm.network_gbit:g} Gbit/s" if vm.network_gbit else ""
    replaced = {"where", "workers", "memory per worker", "communication", "cost", "strategy"}
    return [
        ("nodes", f"{nodes.nodes} x {vm.name} ({machine}{network}) in {nodes.region}, {kind}"),
        ("head", f"{head.name} ({head.vcpus} vCPU, {head.memory_gib} GiB), on demand"),
        ("workers", _placement(made)),
        *(pair for pair in plan.lines() if pair[0] not in replaced),
        ("gradients", f"{size(plan.gradient_bytes_per_step)} per step with {made.chosen}"),
        ("link", _link(made)),
    ]


def _placement(made: NodePlan) -> str:
    """Return the placement of the workers, such as `2 on each of 4 nodes`."""
    machines, numbers = made.plan.machines, made.workers_per_node
    groups = [(workers, numbers.count(workers)) for workers in dict.fromkeys(numbers) if workers]
    placed = ", ".join(
        f"{workers} on each of {nodes} nodes" if nodes > 1 else f"{workers} on one node" for workers, nodes in groups
    )
    return f"{placed} ({machines.cpus_per_worker:g} CPU and {machines.gpus_per_worker:g} GPU each)"


def _link(made: NodePlan) -> str:
    if made.link is None:
        return "none: one worker"
    rate = f"{made.link.bandwidth * 8 / 1e9:.3g} Gbit/s, {made.link.latency * 1e6:.0f} us from worker to worker"
    if sum(1 for workers in made.workers_per_node if workers) > 1:
        return f"{rate} (assumed: 94 % of the network bandwidth)"
    return f"{rate} (assumed: half the bandwidth of PCI Express {made.nodes.size.pcie}; no network between VMs)"


def _strategies(made: NodePlan) -> Any:
    numbers = ("memory", "max microbatch", "sent per step", "step", "wait")
    grid = _table("strategy", "memory", "fits", *numbers[1:], numbers=numbers)
    for one in made.forecasts:
        grid.add_row(
            ("* " if one.strategy == made.chosen else "  ") + one.strategy.replace("compression=", ""),
            size(one.needs),
            "yes" if one.fits else "no",
            f"{one.largest_microbatch:,}",
            size(one.bytes_per_step) if one.bytes_per_step else "",
            format_time(one.seconds_per_step),
            "unknown" if one.communication_share is None else f"{one.communication_share:.0%}",
        )
    return grid


def _time(made: NodePlan) -> Any:
    parts = ", ".join(f"{what} {size(part)}" for what, part in made.forecast.memory.items())
    rows = [("memory per worker", parts), ("fastest that fits", _best(made)), ("computing", _computing(made))]
    if made.seconds is not None:
        each, whole = format_time(made.seconds_per_epoch), format_time(made.seconds)
        total = f"{each} per epoch, {whole} for {count(made.plan.batches.steps, 'step')}"
        rows.append(("time", f"{total}; excludes the start of the VMs (minutes), data loading and evaluation"))
    return _pairs(rows)


def _best(made: NodePlan) -> str:
    if made.best is None:
        return "unknown" if made.forecast.fits else "none of these fits"
    if made.computing.is_launch_bound:
        return "cannot be determined from lower bounds, see below"
    exclusion = " (excludes the time to compress)" if "powersgd" in made.best else ""
    if made.best == made.best_exact or made.best_exact is None:
        return f"{made.best}{exclusion}"
    return f"{made.best}{exclusion}; with the same losses as one worker: {made.best_exact} (docs/exactness.md)"


def _computing(made: NodePlan) -> str:
    computing = made.computing
    if computing.seconds is None or computing.flops_per_sample is None or computing.peak_flops is None:
        return "unknown"
    origin = "defined by the model" if computing.flops_from == "the model" else "counted in its matrix products"
    reached = "assumed at" if computing.mfu_from == "assumed" else f"as reached by {computing.mfu_from},"
    return (
        f"{format_time(computing.seconds)} per step: {computing.flops_per_sample / 1e9:,.4g} GFLOP per sample "
        f"({origin}), {reached} {computing.mfu:.0%} "
        f"of the {made.nodes.size.gpu}'s {computing.peak_flops / 1e12:.4g} TFLOP/s"
    )


def _money(made: NodePlan) -> Any:
    nodes = made.nodes
    grid = _table("cost", "USD/h", "unit price", numbers=("USD/h",))
    price = "spot" if nodes.spot is not False else "on demand"
    label = f"{count(nodes.nodes, 'node')}, {price}"
    grid.add_row(label, _dollars(nodes.nodes_usd_per_hour), _source(nodes.node_price))
    if nodes.spot == "prefer":
        on_demand = nodes.size.price(nodes.region)
        grid.add_row("or on demand", _dollars(nodes.nodes_usd_per_hour_on_demand), _source(on_demand))
    grid.add_row("head", _dollars(nodes.head_usd_per_hour), _source(nodes.head_price))
    grid.add_row("total", _dollars(nodes.usd_per_hour), "without disks, addresses and traffic")
    if made.usd is not None:
        grid.add_row("the run", f"{made.usd:,.2f} USD", format_time(made.seconds))
    if made.budget is not None:
        paid = [(made.budget.hours, "hour"), (made.budget.epochs, "epoch")]
        amounts = " or ".join(count(float(f"{number:.4g}"), unit) for number, unit in paid if number is not None)
        grid.add_row("budget", f"{made.budget.usd:,.2f} USD", f"pays for {amounts}" if amounts else "")
    return grid


def _dollars(usd: float | None) -> str:
    return "unknown" if usd is None else f"{usd:,.3f}"


def _source(price: Price | None) -> str:
    return "" if price is None else f"{price.usd_per_hour:.3f} from {price.source}, {price.date}"


def _quotas(made: NodePlan) -> Any:
    grid = _table("family", "vCPUs", "for", numbers=("vCPUs",))
    for one in made.nodes.quotas():
        grid.add_row(one.name, str(one.vcpus), one.what)
    return grid


def _created(made: NodePlan) -> Any:
    grid = _table("resource", "number", "", numbers=("number",))
    for one in made.nodes.resources():
        grid.add_row(one["kind"], str(one["count"]), one["what"])
    return grid
