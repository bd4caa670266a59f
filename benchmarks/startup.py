"""Measures the seconds from the command to the first optimizer step, compared with the same training by hand.

    python benchmarks/startup.py                              experiment=mnist, five rounds, about ten minutes
    python benchmarks/startup.py --experiment mnist_tiny
    python benchmarks/startup.py --only alone                 one process, without Ray

The benchmark compares `launch` on its embedded Ray, and on a Ray kept by the previous command, with a bare TorchTrainer
script (`ray.init()` with its defaults, as in `fit()`), two workers each; and `launch cluster=none` with a plain Python
script. The time starts before the process, and ends when the first step of the same optimizer (benchmarks/timed.py) is
done on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.figures import Demand, Figures, Report, ratio, spread
from benchmarks.harness import Failed, Measure

RAY, BARE = "launch, 2 workers", "bare TorchTrainer, 2 workers"
KEPT = "launch, Ray kept by the command before"
NONE, SCRIPT, SILENT = "launch cluster=none", "plain script", "plain script without TensorBoard"
# (launch, the peer, the required ratio)
PAIRS = {
    "ray": ((RAY, BARE), (KEPT, BARE)),
    "alone": ((NONE, SCRIPT), (NONE, SILENT)),
}
DEMANDS = {
    "mnist": {(RAY, BARE): Demand(most=1.1), (KEPT, BARE): Demand(most=0.6), (NONE, SCRIPT): Demand(most=1.1)},
    "mnist_tiny": {(RAY, BARE): Demand(most=0.85), (KEPT, BARE): Demand(most=0.6), (NONE, SCRIPT): Demand(most=1.1)},
}
# From conf/experiment: global batch, and number of training images.
EXPERIMENTS = {"mnist": (100, None), "mnist_tiny": (50, 500)}
STEPS = 2
SETTLE_SECONDS = 2.0  # the processes of a stopped Ray need a moment to exit


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), default="mnist")
    parser.add_argument("--only", choices=list(PAIRS), help="one of the two comparisons")
    options = parser.parse_args()
    pause = 0.0 if options.only == "alone" else SETTLE_SECONDS
    found = harness.interleave(systems(options), options.rounds, harness.progress, pause)
    report(options, found).finish(options.json)


def systems(options: argparse.Namespace) -> dict[str, Measure]:
    batch, limit = EXPERIMENTS[options.experiment]
    peer = ["--steps", str(STEPS), "--batch", str(batch), *(["--limit", str(limit)] if limit else [])]
    all_of_them = {
        RAY: launch(options.experiment, "scaling.workers=2"),
        KEPT: kept(options.experiment, "scaling.workers=2"),
        BARE: by_hand("with_ray_train", *peer),
        NONE: launch(options.experiment, "cluster=none"),
        SCRIPT: by_hand("alone", *peer),
        SILENT: by_hand("alone", *peer, "--without-tensorboard"),
    }
    asked = [pairs for which, pairs in PAIRS.items() if options.only in (None, which)]
    wanted = {name for pairs in asked for pair in pairs for name in pair}
    return {name: measure for name, measure in all_of_them.items() if name in wanted}


def kept(experiment: str, *words: str) -> Measure:
    """Measure the second of two commands, which uses the Ray of the first (`cluster.keep_minutes`)."""

    def measure(folder: Path) -> Figures:
        (folder / "runtime").mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(folder / "runtime")
        again = launch(experiment, *words, "cluster.keep_minutes=2")
        try:
            again(folder)
            shutil.rmtree(folder / "runs")
            return again(folder)
        finally:
            harness.run([sys.executable, "-m", "launcher", "down"], folder)
            del os.environ["XDG_RUNTIME_DIR"]

    return measure


def launch(experiment: str, *words: str) -> Measure:
    def measure(folder: Path) -> Figures:
        command = [sys.executable, "-m", "launcher", f"experiment={experiment}", *words]
        command += [f"run.root={folder / 'runs'}", "run.name=run", f"trainer.steps={STEPS}", "trust=[benchmarks]"]
        command += ["scheduler=none"]  # a warm-up longer than these steps would be rejected
        command += ["optimizer._target_=benchmarks.timed.AdamW", f"+optimizer.first_step={folder / 'first'}"]
        figures = timed(command, folder)
        result = json.loads((folder / "runs/run/result.json").read_text())
        # The run's own timing starts after Python and the imports of the command line.
        return figures | {"seconds_to_first_step": result["seconds_to_first_step"]}

    return measure


def by_hand(module: str, *words: str) -> Measure:
    def measure(folder: Path) -> Figures:
        files = ["--directory", str(folder / "runs"), "--first-step", str(folder / "first")]
        return timed([sys.executable, "-m", f"benchmarks.peers.{module}", *words, *files], folder)

    return measure


def timed(command: list[str], folder: Path) -> Figures:
    """Run the command; return the seconds to its first step and to its end."""
    home = folder / "home"  # Ray stores a token and settings in it
    home.mkdir(exist_ok=True)
    began = time.time()
    harness.run(command, folder, environment={"HOME": str(home)})
    ended = time.time()
    first = float((folder / "first").read_text())
    return {"first_step": first - began, "whole": ended - began}


def report(options: argparse.Namespace, found: dict[str, list[Figures]]) -> Report:
    batch, limit = EXPERIMENTS[options.experiment]
    settings = {
        "experiment": options.experiment,
        "global batch": batch,
        "training pictures": limit or 4000,
        "rounds": options.rounds,
    }
    result = Report("startup", settings)
    result.content = {"systems": {}, "ratios": []}
    for name, runs in found.items():
        first, whole = spread(runs, "first_step"), spread(runs, "whole")
        own = spread(runs, "seconds_to_first_step") if "seconds_to_first_step" in runs[0] else None
        result.rows.append(
            {
                "system": name,
                "to first step, s": first.text(2),
                "seconds_to_first_step": own.text(2) if own else "",
                "whole command, s": whole.text(2),
            }
        )
        result.content["systems"][name] = {"first_step": first.to_dict(), "whole": whole.to_dict()}
        if own:
            result.content["systems"][name]["seconds_to_first_step"] = own.to_dict()
    for pairs in PAIRS.values():
        for ours, other in pairs:
            if ours in found:
                times = ratio(found[ours], found[other], "first_step")
                demand = DEMANDS[options.experiment].get((ours, other), Demand())
                result.remarks.append(f"{ours} / {other}: {times.text(3)}  {demand.text(times.median)}".rstrip())
                result.content["ratios"].append({"of": ours, "to": other, "asked": demand.most, **times.to_dict()})
    result.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile). A ratio is taken within each round; its median is "
        "shown. The files are in the page cache from the first round on."
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"startup: {failure}")
