"""What `trainer.deterministic=true` costs: steps per second with it and without, for one and two workers.

    python benchmarks/exactness.py          the convolutional network and the MLP, five rounds, about ten minutes

Without it a single worker computes with all cores. With it every worker computes with one thread, whatever the machine,
since kernels split their sums by threads: for one worker the cost holds that as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.harness import Failed, Figures, Measure, Report, ratio, spread, torchrun

NETWORKS = {"convnet": "ConvNet", "mlp": "MLP"}


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=100, help="samples in a step, over all workers (default 100)")
    parser.add_argument("--first", type=int, default=100, help="the step at which the time begins (default 100)")
    parser.add_argument("--last", type=int, default=400, help="the step at which it ends (default 400)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    if not 0 < options.first < options.last:
        parser.error("--first must lie above 0 and below --last")
    found = harness.interleave(systems(options), options.rounds, harness.progress)
    report(options, found).finish(options.json)


def name(network: str, workers: int, exact: bool) -> str:
    return f"{NETWORKS[network]}, {workers} worker{'s' if workers > 1 else ''}{', deterministic' if exact else ''}"


def systems(options: argparse.Namespace) -> dict[str, Measure]:
    return {
        name(network, workers, exact): launch(options, network, workers, exact)
        for network, workers, exact in itertools.product(options.networks, options.workers, (False, True))
    }


def launch(options: argparse.Namespace, network: str, workers: int, exact: bool) -> Measure:
    def measure(folder: Path) -> Figures:
        stopwatch = folder / "stopwatch.json"
        words = ["-m", "launcher", "experiment=mnist", f"model={network}", f"run.root={folder}", "run.name=run"]
        words += [f"trainer.deterministic={str(exact).lower()}", f"trainer.global_batch_size={options.batch}"]
        # A deterministic step has several passes through the network, one a chunk: the optimizer keeps time.
        words += ["trust=[benchmarks]", "optimizer._target_=benchmarks.timed.AdamW"]
        words += [f"+optimizer.stopwatch={stopwatch}", f"+optimizer.steps={options.last}"]
        words += [f"trainer.steps={options.last}", "trainer.log_every=50", "scheduler=none"]
        words += [f"trainer.evaluate_every={10 * options.last}", f"checkpoint.every={10 * options.last}"]
        alone = [sys.executable, *words, "cluster=none"]
        harness.run(alone if workers == 1 else torchrun(workers, *words), folder)
        found = json.loads(stopwatch.read_text())
        steps = found["steps"]
        seconds = steps[options.last - 1] - steps[options.first - 1]
        if found["facts"]["workers"] != workers:
            raise Failed(f"{workers} workers were asked for, and there were {found['facts']['workers']}")
        return {"steps_per_second": (options.last - options.first) / seconds, "facts": found["facts"]}

    return measure


def report(options: argparse.Namespace, found: dict[str, list[Figures]]) -> Report:
    settings = {
        "global batch": options.batch,
        "timed": f"steps {options.first} to {options.last}",
        "rounds": options.rounds,
    }
    result = Report("exactness", settings)
    result.content = {"comparisons": []}
    for network, workers in itertools.product(options.networks, options.workers):
        usual, exact = (found[name(network, workers, flag)] for flag in (False, True))
        slower = ratio(usual, exact, "steps_per_second")
        rates = [spread(runs, "steps_per_second") for runs in (usual, exact)]
        threads = [runs[-1]["facts"]["threads"] for runs in (usual, exact)]
        result.rows.append(
            {
                "network": NETWORKS[network],
                "workers": str(workers),
                "threads per worker": f"{threads[0]}, deterministic {threads[1]}",
                "steps/s": rates[0].text(1),
                "steps/s, deterministic": rates[1].text(1),
                "slower by": f"{slower.text(2)} times",
            }
        )
        result.content["comparisons"].append(
            {
                "network": NETWORKS[network],
                "workers": workers,
                "threads": {"usual": threads[0], "deterministic": threads[1]},
                "steps_per_second": {"usual": rates[0].to_dict(), "deterministic": rates[1].to_dict()},
                "slow_down": slower.to_dict(),
            }
        )
    result.remarks.append(
        "Medians over the rounds (lowest … highest). A ratio is taken within each round; its median is shown."
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"exactness: {failure}")
