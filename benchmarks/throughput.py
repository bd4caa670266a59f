"""Steps per second of `launch`, a plain DDP script, Accelerate and Lightning: same network, data, batch and workers.

    python benchmarks/throughput.py                       five rounds of everything, about ten minutes
    python benchmarks/throughput.py --only launch plain   some of the systems

The convolutional network and the digits of `experiment=mnist`, AdamW, TensorBoard written every 50 steps by each of
them. Time is taken inside the network (benchmarks/timed.py): from the pass that begins step N to that of step M.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.harness import Demand, Failed, Figures, Measure, Report, ratio, spread, torchrun

LOG_EVERY = 50
LAUNCH, BY_RAY = "launch (torchrun)", "launch (Ray Train)"
# The peers, and how many times as fast as each of them `launch` is to be. The last two are what a plain script becomes
# when its author knows what `launch` does unasked; they are reported, and nothing is demanded.
DEMANDS = {
    "plain DDP": Demand(least=1.2),
    "Accelerate": Demand(least=1.2),
    "Lightning": Demand(least=1.3),
    "plain DDP, channels-last": Demand(),
    "plain DDP, channels-last, fused": Demand(),
}
SYSTEMS = {  # by the word that --only takes
    "launch": LAUNCH,
    "ray": BY_RAY,
    "plain": "plain DDP",
    "accelerate": "Accelerate",
    "lightning": "Lightning",
    "channels-last": "plain DDP, channels-last",
    "tuned": "plain DDP, channels-last, fused",
}
# What must be the same for all, of what benchmarks/timed.py notes. The memory layout is each system's own affair.
LIKE_FOR_LIKE = ("batch", "dtype", "workers", "threads", "parameters")


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=100, help="samples in a step, over all workers (default 100)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first", type=int, default=150, help="the step N at which the time begins (default 150)")
    parser.add_argument("--last", type=int, default=750, help="the step M at which it ends (default 750)")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="systems to measure")
    options = parser.parse_args()
    if not 0 < options.first < options.last:
        parser.error("--first must lie above 0 and below --last")
    found = harness.interleave(systems(options), options.rounds, harness.progress)
    check_like_for_like(found)
    report(options, found).finish(options.json)


def systems(options: argparse.Namespace) -> dict[str, Measure]:
    """The systems to be measured, by name. A peer that is not installed is left out, and that is said."""
    chosen = [SYSTEMS[word] for word in options.only]
    for package, name in (("accelerate", "Accelerate"), ("lightning", "Lightning")):
        if name in chosen and not harness.available(package):
            harness.progress(f"{name} is not installed and is left out; pip install '.[bench]' brings the peers.")
            chosen.remove(name)
    measures = {
        LAUNCH: launch(options, by_ray=False),
        BY_RAY: launch(options, by_ray=True),
        "plain DDP": peer(options, "plain"),
        "Accelerate": peer(options, "with_accelerate"),
        "Lightning": peer(options, "with_lightning"),
        "plain DDP, channels-last": peer(options, "plain", "--channels-last"),
        "plain DDP, channels-last, fused": peer(options, "plain", "--channels-last", "--tuned"),
    }
    return {name: measures[name] for name in chosen}


def launch(options: argparse.Namespace, by_ray: bool) -> Measure:
    def measure(folder: Path) -> Figures:
        words = ["-m", "launcher", "experiment=mnist", f"run.root={folder}", "run.name=run"]
        words += ["trust=[benchmarks]", "model._target_=benchmarks.timed.ConvNet"]
        words += [f"+model.stopwatch={folder / 'stopwatch.json'}"]
        words += [f"+model.passes={options.last}", f"trainer.steps={options.last}", f"trainer.log_every={LOG_EVERY}"]
        # The optimizer of the peers: PyTorch's defaults at a constant rate.
        words += [f"trainer.global_batch_size={options.batch}", "scheduler=none"]
        words += ["optimizer.lr=1e-3", "optimizer.weight_decay=1e-2"]
        # Validation and checkpoints come after the steps that are timed; the peers have neither.
        words += [f"trainer.evaluate_every={10 * options.last}", f"checkpoint.every={10 * options.last}"]
        by_hand = [sys.executable, *words, f"scaling.workers={options.workers}"]
        harness.run(by_hand if by_ray else torchrun(options.workers, *words), folder)
        return figures(options, folder)

    return measure


def peer(options: argparse.Namespace, module: str, *words: str) -> Measure:
    def measure(folder: Path) -> Figures:
        arguments = ["--steps", options.last, "--batch", options.batch, "--workers", options.workers]
        arguments += ["--directory", folder, "--stopwatch", folder / "stopwatch.json", *words]
        harness.run(torchrun(options.workers, "-m", f"benchmarks.peers.{module}", *map(str, arguments)), folder)
        return figures(options, folder)

    return measure


def figures(options: argparse.Namespace, folder: Path) -> Figures:
    """Steps per second between the passes N and M, and what shows that the same was done."""
    stamps = json.loads((folder / "stopwatch.json").read_text())
    steps = options.last - options.first
    seconds, computing = (stamps[key][options.last - 1] - stamps[key][options.first - 1] for key in ("passes", "cpu"))
    losses = logged_losses(folder)
    return {
        "steps_per_second": steps / seconds,
        "cpu_milliseconds": 1000 * computing / steps,
        "last_loss": losses[-1],
        "logged": len(losses),
        "facts": stamps["facts"],
    }


def logged_losses(folder: Path) -> list[float]:
    """What the system wrote under train/loss, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            # Lightning counts steps from 0. What `launch` logs at its end, after the steps that are timed, is left out.
            steps = (0, LOG_EVERY - 1)
            return [event.value for event in events.Scalars("train/loss") if event.step % LOG_EVERY in steps]
    raise Failed(f"nothing was written under train/loss for TensorBoard below {folder}")


def check_like_for_like(found: dict[str, list[Figures]]) -> None:
    """Raise Failed where two systems did not do the same work."""
    seen = [
        (name, {fact: run["facts"][fact] for fact in LIKE_FOR_LIKE} | {"logged": run["logged"]})
        for name, runs in found.items()
        for run in runs
    ]
    first, wanted = seen[0]
    for name, facts in seen:
        different = {fact: (facts[fact], wanted[fact]) for fact in facts if facts[fact] != wanted[fact]}
        if different:
            raise Failed(f"{name} and {first} did not do the same, so their times cannot be compared: {different}")


def report(options: argparse.Namespace, found: dict[str, list[Figures]]) -> Report:
    facts = next(iter(found.values()))[0]["facts"]
    settings = {
        "network": f"ConvNet of {facts['parameters']} parameters",
        "workers": options.workers,
        "threads per worker": facts["threads"],
        "global batch": options.batch,
        "timed": f"steps {options.first} to {options.last}",
        "rounds": options.rounds,
        "TensorBoard": f"every {LOG_EVERY} steps",
    }
    result = Report("throughput", settings)
    result.content = {"systems": {}, "ratios": {}}
    ours = found.get(LAUNCH)
    for name, runs in found.items():
        rate = spread(runs, "steps_per_second")
        busy = spread(runs, "cpu_milliseconds")
        row = {"system": name, "steps/s": rate.text(1), "CPU ms a step": busy.text(1)}
        row |= {"launch is faster by": "", "asked": ""}
        if ours is not None and name in DEMANDS:
            times = ratio(ours, runs, "steps_per_second")
            demand = DEMANDS[name]
            row |= {"launch is faster by": f"{times.text(2)} times", "asked": demand.text(times.median)}
            result.content["ratios"][name] = times.to_dict() | {"asked": demand.least}
        result.rows.append(row)
        result.content["systems"][name] = {
            "steps_per_second": rate.to_dict(),
            "cpu_milliseconds": busy.to_dict(),
            "last_loss": spread(runs, "last_loss").to_dict(),
            "facts": runs[-1]["facts"],
        }
    result.remarks.append(
        "Medians over the rounds (lowest … highest). A ratio is taken within each round; its median is shown. "
        "CPU is that of rank 0 with all its threads: what else the machine does moves it less than the rate."
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"throughput: {failure}")
