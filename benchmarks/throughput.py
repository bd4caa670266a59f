"""Compares steps per second of `launch`, a plain DDP script, Accelerate and Lightning on the same training job.

    python benchmarks/throughput.py                       forty rounds of everything, about six minutes
    python benchmarks/throughput.py --only launch plain   some of the systems
    python benchmarks/throughput.py --network gpt         a small GPT, where computation dominates
    python benchmarks/throughput.py --only launch --beside CHECKOUT   an older commit, checked out there, in turn

The convolutional network and the digits of `experiment=mnist`, AdamW, TensorBoard written every 50 steps by each of
them; with `--network gpt` the GPT, text and precision of `experiment=language` and a plain DDP script over them,
TensorBoard every 10 steps. All systems are started, and then compute in turn for some steps each; the time is measured
inside the network (benchmarks/timed.py), from the pass that starts one step to the pass that starts another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.figures import Demand, Figures, Report, Spread, ratio
from benchmarks.harness import Command, Failed, Turns, torchrun
from benchmarks.peers import plain_gpt

LOG_EVERY = 50
SKIPPED = 10  # steps of a turn before its timing starts
LAUNCH, BY_RAY, BESIDE = "launch (torchrun)", "launch (Ray Train)", "launch of the other checkout"
# The peers, and the required speed-up of `launch` over each. The last two are plain scripts with the optimizations that
# `launch` applies by default; they are reported without a requirement.
DEMANDS = {
    "plain DDP": Demand(least=1.2),
    "Accelerate": Demand(least=1.2),
    "Lightning": Demand(least=1.3),
    "plain DDP, channels-last": Demand(),
    "plain DDP, channels-last, fused": Demand(),
}
SYSTEMS = {  # by the argument of --only
    "launch": LAUNCH,
    "ray": BY_RAY,
    "plain": "plain DDP",
    "accelerate": "Accelerate",
    "lightning": "Lightning",
    "channels-last": "plain DDP, channels-last",
    "tuned": "plain DDP, channels-last, fused",
}
GPT_DEMANDS = {"plain DDP": Demand(least=0.99), "plain DDP, fused": Demand()}
GPT_SYSTEMS = {"launch": LAUNCH, "ray": BY_RAY, "plain": "plain DDP", "tuned": "plain DDP, fused"}
# Defaults: rounds, global batch, steps before the first turn, skipped steps, and steps of a turn.
USUAL = {
    "convnet": {"rounds": 40, "batch": 100, "warm_up": 100, "skipped": SKIPPED, "turn": 50, "log_every": LOG_EVERY},
    "gpt": {"rounds": 12, "batch": 32, "warm_up": 4, "skipped": 1, "turn": 5, "log_every": plain_gpt.LOG_EVERY},
}
# What must be equal for all: the description from benchmarks/timed.py, and the number of TensorBoard writes. The memory
# layout may differ.
LIKE_FOR_LIKE = ("batch", "dtype", "workers", "threads", "parameters", "logged")


def main() -> None:
    parser = harness.parser(__doc__, rounds=40)
    parser.set_defaults(rounds=None)
    parser.add_argument("--network", choices=list(USUAL), default="convnet")
    parser.add_argument("--batch", type=int, help="samples in a step, over all workers (default 100; of the GPT 32)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--warm-up", type=int, help="steps before the first turn (default 100; 4)")
    parser.add_argument("--turn", type=int, help="steps in a turn that are timed (default 50; 5)")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), help="systems to measure")
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="CHECKOUT",
        help="measure the launcher of another checkout as well",
    )
    options = parser.parse_args()
    for name, value in USUAL[options.network].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    known = SYSTEMS if options.network == "convnet" else GPT_SYSTEMS
    options.only = options.only or list(known)
    if not set(options.only) <= set(known):
        parser.error(f"with --network {options.network} there are {', '.join(known)}")
    count = len(options.only) + (options.beside is not None)
    turns = Turns(options.rounds, options.warm_up, options.skipped, options.turn, count)
    started = systems(options, turns.total)
    if options.beside is not None:
        started[BESIDE] = in_checkout(options.beside.resolve(), launch(options, turns.total, by_ray=False))
    found, facts = harness.take_turns(
        started, turns, harness.progress, lambda folder: losses(folder, options.log_every)
    )
    check_like_for_like(facts)
    report(options, found, facts).finish(options.json)


def systems(options: argparse.Namespace, steps: int) -> dict[str, Command]:
    """Return the systems to measure, by name. A peer that is not installed is omitted, with a message."""
    if options.network == "gpt":
        return gpt_systems(options, steps)
    chosen = [SYSTEMS[word] for word in options.only]
    for package, name in (("accelerate", "Accelerate"), ("lightning", "Lightning")):
        if name in chosen and not harness.available(package):
            harness.progress(f"{name} is not installed and is left out; pip install '.[bench]' brings the peers.")
            chosen.remove(name)
    commands = {
        LAUNCH: launch(options, steps, by_ray=False),
        BY_RAY: launch(options, steps, by_ray=True),
        "plain DDP": peer(options, steps, "plain"),
        "Accelerate": peer(options, steps, "with_accelerate"),
        "Lightning": peer(options, steps, "with_lightning"),
        "plain DDP, channels-last": peer(options, steps, "plain", "--channels-last"),
        "plain DDP, channels-last, fused": peer(options, steps, "plain", "--channels-last", "--tuned"),
    }
    return {name: commands[name] for name in chosen}


def gpt_systems(options: argparse.Namespace, steps: int) -> dict[str, Command]:
    commands = {
        LAUNCH: launch(options, steps, by_ray=False),
        BY_RAY: launch(options, steps, by_ray=True),
        "plain DDP": peer(options, steps, "plain_gpt"),
        "plain DDP, fused": peer(options, steps, "plain_gpt", "--tuned"),
    }
    return {GPT_SYSTEMS[word]: commands[GPT_SYSTEMS[word]] for word in options.only}


def launch(options: argparse.Namespace, steps: int, by_ray: bool) -> Command:
    experiment, network = {"convnet": ("mnist", "ConvNet"), "gpt": ("language", "GPT")}[options.network]

    def command(turns: str, folder: Path) -> list[str]:
        words = ["-m", "launcher", f"experiment={experiment}", f"run.root={folder}", "run.name=run"]
        words += [f"trainer.steps={steps}", f"trainer.log_every={options.log_every}"]
        words += ["trust=[benchmarks]", f"model._target_=benchmarks.timed.{network}", f"+model.turns={turns}"]
        # The optimizer of the peers: PyTorch's defaults at a constant rate.
        words += [f"trainer.global_batch_size={options.batch}", "scheduler=none"]
        words += ["optimizer.lr=1e-3", "optimizer.weight_decay=1e-2", "optimizer.groups=[]"]
        # Validation and checkpoints run after the timed steps; the peers have neither.
        words += [f"trainer.evaluate_every={10 * steps}", f"checkpoint.every={10 * steps}"]
        by_hand = [sys.executable, *words, f"scaling.workers={options.workers}"]
        return by_hand if by_ray else torchrun(options.workers, *words)

    return command


def in_checkout(checkout: Path, command: Command) -> Command:
    """Return the command run with the modules of another checkout."""
    return lambda turns, folder: ["env", "-C", str(checkout), f"PYTHONPATH={checkout}", *command(turns, folder)]


def peer(options: argparse.Namespace, steps: int, module: str, *words: str) -> Command:
    def command(turns: str, folder: Path) -> list[str]:
        arguments = ["--steps", steps, "--batch", options.batch, "--workers", options.workers]
        arguments += ["--directory", folder, "--turns", turns, *words]
        return torchrun(options.workers, "-m", f"benchmarks.peers.{module}", *map(str, arguments))

    return command


def losses(folder: Path, log_every: int = LOG_EVERY) -> Figures:
    logged = logged_losses(folder, log_every)
    return {"logged": len(logged), "last_loss": logged[-1]}


def logged_losses(folder: Path, log_every: int) -> list[float]:
    """Return the values of train/loss, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            # Lightning counts steps from 0. The last log of `launch`, after the timed steps, is excluded.
            steps = (0, log_every - 1)
            return [event.value for event in events.Scalars("train/loss") if event.step % log_every in steps]
    raise Failed(f"nothing was written under train/loss for TensorBoard below {folder}")


def check_like_for_like(facts: dict[str, Figures]) -> None:
    """Raise Failed if two systems did not do the same work."""
    first = next(iter(facts))
    for name, own in facts.items():
        different = {what: (own[what], facts[first][what]) for what in LIKE_FOR_LIKE if own[what] != facts[first][what]}
        if different:
            raise Failed(f"{name} and {first} did not do the same, so their times cannot be compared: {different}")


def report(options: argparse.Namespace, found: dict[str, list[Figures]], facts: dict[str, Figures]) -> Report:
    known = next(iter(facts.values()))
    settings = {
        "network": f"{'ConvNet' if options.network == 'convnet' else 'GPT'} of {known['parameters']} parameters",
        "workers": options.workers,
        "threads per worker": known["threads"],
        "global batch": options.batch,
        "a turn": f"{options.turn} steps",
        "rounds": options.rounds,
        "TensorBoard": f"every {options.log_every} steps",
    }
    result = Report("throughput", settings)
    result.content = {"systems": {}, "ratios": {}}
    demands = (DEMANDS if options.network == "convnet" else GPT_DEMANDS) | {BESIDE: Demand(least=0.99)}
    for name, turns in found.items():
        rate = Spread([options.turn / turn["seconds"] for turn in turns])
        busy = Spread([1000 * turn["cpu"] / options.turn for turn in turns])
        row = {
            "system": name,
            "steps/s": rate.text(1 if options.network == "convnet" else 2),
            "CPU ms a step": busy.text(1),
        }
        row |= {"launch is faster by": "", "asked": ""}
        if LAUNCH in found and name in demands:
            times = ratio(turns, found[LAUNCH], "seconds")
            demand = demands[name]
            row |= {"launch is faster by": f"{times.text(2)} times", "asked": demand.text(times.median)}
            result.content["ratios"][name] = times.to_dict() | {"asked": demand.least}
        result.rows.append(row)
        result.content["systems"][name] = {
            "steps_per_second": rate.to_dict(),
            "cpu_milliseconds": busy.to_dict(),
            "facts": facts[name],
        }
    result.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile). A ratio is taken within each round; its median is "
        "shown. CPU is that of rank 0 with all its threads: what else the machine does moves it less than the rate."
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"throughput: {failure}")
