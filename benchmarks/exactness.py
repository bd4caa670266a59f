"""Measures the cost of `trainer.deterministic=true`: steps per second with and without it, for one and two workers.

    python benchmarks/exactness.py          the convolutional network and the MLP, ten rounds, about five minutes

Without it a single worker uses all cores. With it every worker uses one thread on any machine, because kernels split
their sums by threads: for one worker the cost includes that as well.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.figures import Figures, Report, Spread, ratio
from benchmarks.harness import Command, Failed, Turns, torchrun

SKIPPED = 5  # steps of a turn before its timing starts
NETWORKS = {"convnet": "ConvNet", "mlp": "MLP"}


def main() -> None:
    parser = harness.parser(__doc__, rounds=10)
    parser.add_argument("--batch", type=int, default=100, help="samples in a step, over all workers (default 100)")
    parser.add_argument("--warm-up", type=int, default=50, help="steps before the first turn (default 50)")
    parser.add_argument("--turn", type=int, default=50, help="steps in a turn that are timed (default 50)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    number = 2 * len(options.networks) * len(options.workers)
    turns = Turns(options.rounds, options.warm_up, SKIPPED, options.turn, number)
    found, facts = harness.take_turns(systems(options, turns.total), turns, harness.progress, lambda folder: {})
    report(options, found, facts).finish(options.json)


def name(network: str, workers: int, exact: bool) -> str:
    return f"{NETWORKS[network]}, {workers} worker{'s' if workers > 1 else ''}{', deterministic' if exact else ''}"


def systems(options: argparse.Namespace, steps: int) -> dict[str, Command]:
    return {
        name(network, workers, exact): launch(options, steps, network, workers, exact)
        for network, workers, exact in itertools.product(options.networks, options.workers, (False, True))
    }


def launch(options: argparse.Namespace, steps: int, network: str, workers: int, exact: bool) -> Command:
    def command(turns: str, folder: Path) -> list[str]:
        words = ["-m", "launcher", "experiment=mnist", f"model={network}", f"run.root={folder}", "run.name=run"]
        words += [f"trainer.deterministic={str(exact).lower()}", f"trainer.global_batch_size={options.batch}"]
        # A deterministic step has several passes through the network, one per chunk, so the optimizer is timed.
        words += ["trust=[benchmarks]", "optimizer._target_=benchmarks.timed.AdamW", f"+optimizer.turns={turns}"]
        words += [f"trainer.steps={steps}", "trainer.log_every=50", "scheduler=none"]
        words += [f"trainer.evaluate_every={10 * steps}", f"checkpoint.every={10 * steps}"]
        return [sys.executable, *words, "cluster=none"] if workers == 1 else torchrun(workers, *words)

    return command


def report(options: argparse.Namespace, found: dict[str, list[Figures]], facts: dict[str, Figures]) -> Report:
    settings = {"global batch": options.batch, "a turn": f"{options.turn} steps", "rounds": options.rounds}
    result = Report("exactness", settings)
    result.content = {"comparisons": []}
    for network, workers in itertools.product(options.networks, options.workers):
        names = [name(network, workers, exact) for exact in (False, True)]
        usual, exact = (found[one] for one in names)
        slower = ratio(exact, usual, "seconds")
        rates = [Spread([options.turn / turn["seconds"] for turn in turns]) for turns in (usual, exact)]
        busier = ratio(exact, usual, "cpu")
        threads = [facts[one]["threads"] for one in names]
        if [facts[one]["workers"] for one in names] != [workers, workers]:
            raise Failed(f"{workers} workers were asked for, and there were {facts[names[0]]['workers']}")
        result.rows.append(
            {
                "network": NETWORKS[network],
                "workers": str(workers),
                "threads per worker": f"{threads[0]}, deterministic {threads[1]}",
                "steps/s": rates[0].text(1),
                "steps/s, deterministic": rates[1].text(1),
                "slower by": f"{slower.text(2)} times",
                "CPU time": f"{busier.text(2)} times",
            }
        )
        result.content["comparisons"].append(
            {
                "network": NETWORKS[network],
                "workers": workers,
                "threads": {"usual": threads[0], "deterministic": threads[1]},
                "steps_per_second": {"usual": rates[0].to_dict(), "deterministic": rates[1].to_dict()},
                "slow_down": slower.to_dict(),
                "cpu_time": busier.to_dict(),
            }
        )
    result.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile). A ratio is taken within each round; its median is "
        "shown. CPU time is that of rank 0 with all its threads."
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"exactness: {failure}")
