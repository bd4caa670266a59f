"""Measures the cost of comparing the workers' copies of a model, and of checking gradients for NaN, as shares of
training.

    python benchmarks/copies.py          the convolutional network, an MLP and a small GPT, ten rounds, a minute

Two workers on this machine, one thread each. In every round a worker runs some steps, checks the gradients as often,
and compares its copy with the other's; training compares once in `trainer.log_every` = 50 steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import harness
from benchmarks.figures import Demand, Report, Spread
from launcher.config import TrainerConfig
from launcher.engine.drift import Copy, Drift
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.trained_parameters import TrainedParameters
from models.language import GPT
from models.vision import MLP, ConvNet

WORKERS = 2
LOG_EVERY = 50
MOST = Demand(most=0.005)


def main() -> None:
    parser = harness.parser(__doc__, rounds=10)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round (default 10)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        torch.multiprocessing.spawn(_worker, (folder, options), nprocs=WORKERS)
        found = torch.load(Path(folder, "found"))
    report(options, found).finish(options.json)


def _pictures(count: int) -> Any:
    return torch.randn(count, 1, 28, 28), torch.randint(10, (count,))


def _tokens(count: int) -> Any:
    tokens = torch.randint(255, (count, 129))
    return tokens[:, :-1], tokens[:, 1:]


NETWORKS = {
    "ConvNet": (ConvNet, _pictures, 50),
    "MLP": (MLP, _pictures, 50),
    "GPT": (GPT, _tokens, 4),
}


def _worker(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    runtime = Runtime.adopt(rank, WORKERS, rank, WORKERS, "cpu")
    found = {name: _measure(runtime, *NETWORKS[name], options) for name in options.networks}
    if rank == 0:
        torch.save(found, Path(folder, "found"))
    dist.destroy_process_group()


def _measure(runtime: Runtime, kind: Any, batch_of: Any, share: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of a network, and by round the seconds of a step, of a check and of a comparison."""
    torch.manual_seed(0)
    network: nn.Module = kind()
    batch = batch_of(share)
    strategy = DataParallel(network, runtime, TrainerConfig())
    strategy.prepare(batch)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    strategy.attach(optimizer, 0)
    trained = TrainedParameters(network, optimizer, strategy, [])
    drift = Drift(runtime, [""] * WORKERS, print)

    def step() -> None:
        vote = strategy.accumulate([batch], WORKERS * share, {"bad": False}, lambda answer: None)
        strategy.apply(optimizer, WORKERS * share, vote)

    def look() -> None:
        assert bool(strategy.gradients_are_finite())

    def compare() -> None:
        weights = [(trained.name_of[id(p)], tensor) for p, tensor in strategy.replicated()]
        drift.check(Copy(weights, trained.names(), trained.graded(), trained.unexpected()), 1)

    times: dict[str, list[float]] = {"step": [], "look": [], "compare": []}
    for _ in range(1 + options.rounds):
        for name, action in (("step", step), ("look", look), ("compare", compare)):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(options.steps):
                action()
            times[name].append((time.perf_counter() - began) / options.steps)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, **{name: values[1:] for name, values in times.items()}}


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> Report:
    result = Report("copies", {"workers": WORKERS, "rounds": options.rounds, "steps in a round": options.steps})
    result.content = {"networks": {}}
    for name, figures in found.items():
        each = list(zip(figures["step"], figures["look"], figures["compare"], strict=True))
        compared = Spread([compare / (LOG_EVERY * step) for step, _, compare in each])
        looked = Spread([look / step for step, look, _ in each])
        result.rows.append(
            {
                "network": name,
                "parameters": f"{figures['parameters']:,}",
                "ms a step": Spread([1e3 * step for step, _, _ in each]).text(2),
                "comparing copies, % of the time": f"{100 * compared.median:.2f}",
                "demanded": MOST.text(compared.median),
                "looking at gradients, % of the time": f"{100 * looked.median:.2f}",
            }
        )
        shares = {"comparing": compared.to_dict(), "looking": looked.to_dict()}
        result.content["networks"][name] = {**figures, **shares}
    result.remarks.append(
        "Medians over the rounds. A share is taken within each round. Copies are compared once in "
        f"trainer.log_every={LOG_EVERY} steps, gradients are looked at in every step."
    )
    return result


if __name__ == "__main__":
    main()
