"""Compares one to four workers over links of a given speed with the predictions of launcher/engine/cost.py.

    python benchmarks/scaling.py                      100 Mbit/s and 1 Gbit/s, 1 to 4 workers, about two minutes
    python benchmarks/scaling.py --paper              8 to 1,024 nodes of the catalogue's sizes, without measuring

Each worker is a separate host (a network namespace, benchmarks/namespaces.py; needs root and iproute2) with one thread,
and trains a network of linear layers with DDP on a batch of constant size (weak scaling). The inputs of the model are
measured without joint training: the seconds of a step of one worker, latency and bandwidth of the link between two
workers, and the number of cores, which the workers share. One parameter is fitted to the steps of two workers: the
share of a step's computation that hides communication. Every other point is a prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, namespaces
from benchmarks.figures import Demand, Report
from launcher.engine import cost

RATES = ("100mbit", "1gbit")
WIDTH, BATCH = 1000, 128
NEAR = 0.20  # requirement: maximum relative error of a prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed, in each of two rounds")
    parser.add_argument("--json", help="write the figures to this file as well")
    parser.add_argument("--paper", action="store_true", help="print docs/scaling.md's table")
    parser.add_argument("--rank", type=int, metavar="STEPS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        one_rank(options.rank)
    elif options.paper:
        print(paper())
    else:
        try:
            report(options, measured(options)).finish(options.json)
        except namespaces.NoNamespaces as error:
            sys.exit(f"scaling: {error}")


# ---- measuring ------------------------------------------------------------------------------------------------------


def one_rank(steps: int) -> None:
    """Run one of the workers; rank 0 prints its measurements."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from launcher.engine import probe

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    network = nn.Sequential(*layers)
    x, y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    workers = int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {"bytes": 4 * sum(p.numel() for p in network.parameters())}
    if workers > 1:
        dist.init_process_group("gloo")
        link = probe.measure(dist.group.WORLD, torch.device("cpu"))
        found |= {"latency": link.latency, "bandwidth": link.bandwidth}
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        return time.perf_counter() - began

    times = [step() for _ in range(steps + 3)][3:]
    if os.environ["RANK"] == "0":
        print(json.dumps(found | {"step": statistics.median(times)}), flush=True)
    if workers > 1:
        dist.barrier()
        os._exit(0)  # gloo's threads, which still wait for a slow link, abort a process that exits regularly


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every point in two rounds, so that a disturbance of the machine does not affect only one point."""
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(2):
        for rate in options.rates:
            for workers in options.workers:
                with namespaces.network(workers, rate) as hosts:
                    command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(options.steps)]
                    found = json.loads(namespaces.run(hosts, command)[0].splitlines()[-1])
                points.setdefault((rate, workers), []).append(found)
                harness.progress(f"round {number + 1}/2  {rate}, {workers} worker(s): {found['step'] * 1e3:.1f} ms")
    return [{"rate": rate, "workers": workers, **_middle(runs)} for (rate, workers), runs in points.items()]


def _middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def predictions(points: list[dict[str, Any]], cores: int) -> tuple[list[dict[str, Any]], float]:
    """Return the points with `predicted`, `compute` and `communication`, seconds, and the fitted overlap."""
    alone = statistics.median(point["step"] for point in points if point["workers"] == 1)
    links = {p["rate"]: cost.Link(p["latency"], p["bandwidth"]) for p in points if p["workers"] == 2}
    known = [
        (cost.shared(alone, 2, cores), links[p["rate"]].all_reduce(2, p["bytes"]), p["step"])
        for p in points
        if p["workers"] == 2
    ]
    overlap = cost.fit_overlap(known)
    told = []
    for point in points:
        compute = cost.shared(alone, point["workers"], cores)
        link = links[point["rate"]]
        step = cost.predict(compute, point["bytes"], point["workers"], link, overlap)
        told.append({**point, "predicted": step.seconds, "compute": step.compute, "communication": step.communication})
    return told, overlap


def report(options: argparse.Namespace, points: list[dict[str, Any]]) -> Report:
    cores = len(os.sched_getaffinity(0))
    told, overlap = predictions(points, cores)
    result = Report("scaling", {"network": f"784-{WIDTH}-{WIDTH}-10", "batch a worker": BATCH, "cores": cores})
    result.content = {"points": told, "overlap": overlap}
    demand = Demand(most=NEAR)
    for point in told:
        error = point["predicted"] / point["step"] - 1
        result.rows.append(
            {
                "link": point["rate"],
                "workers": str(point["workers"]),
                "measured, ms": f"{point['step'] * 1e3:.1f}",
                "predicted, ms": f"{point['predicted'] * 1e3:.1f}",
                "of it computing": f"{point['compute'] * 1e3:.1f}",
                "all-reduce": f"{point['communication'] * 1e3:.1f}",
                "error": f"{error:+.0%}",
                "asked": "≤ 20%: met" if abs(error) <= NEAR else "≤ 20%: NOT met",
            }
        )
    worst = max(abs(point["predicted"] / point["step"] - 1) for point in told)
    result.remarks.append(f"The worst prediction is {worst:.1%} from its measurement  {demand.text(worst)}".rstrip())
    result.remarks.append(f"Fitted overlap: {overlap:.2f} of a step's computing hides communication.")
    return result


# ---- on paper -------------------------------------------------------------------------------------------------------

NODES = (1, 8, 32, 128, 1024)
# GPT-2 of 124 M parameters, 16 sequences of 1,024 tokens per GPU and step: 6 FLOPs per parameter and token.
PARAMETERS, TOKENS = 124e6, 16 * 1024


def paper() -> str:
    """Return the table of docs/scaling.md as Markdown."""
    from launcher.clusters.pricing.catalogue import sizes
    from launcher.engine.peaks import peak_flops

    heads = [
        "size",
        "computing, ms",
        *(f"{nodes:,} nodes" for nodes in NODES[1:]),
        "fp16 gradients, 1,024",
        "DiLoCo, 1,024",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for size in sizes().values():
        peak = peak_flops(size.gpu, "float16")
        if size.status == "retired" or peak is None or not size.network_gbit:
            continue
        compute = 6 * PARAMETERS * TOKENS / (peak * cost.MFU)
        # The GPUs of a node reduce locally first; one message per node is sent.
        link = cost.Link.ethernet(size.network_gbit)
        cells = [size.name.removeprefix("Standard_"), f"{compute * 1e3:.0f}"]
        for nodes in NODES[1:]:
            cells.append(f"{_efficiency(cost.predict(compute, 4 * PARAMETERS, nodes, link)):.0%}")
        cells.append(f"{_efficiency(cost.predict(compute, 2 * PARAMETERS, NODES[-1], link)):.0%}")
        cells.append(f"{_efficiency(cost.predict_rare(compute, 4 * PARAMETERS, NODES[-1], link, every=100)):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _efficiency(step: cost.Step) -> float:
    return step.compute / step.seconds


if __name__ == "__main__":
    main()
