"""Measures the time of two workers over a slow link to a given loss, by strategy and compression.

    python benchmarks/communication.py                   # root: the link is a token bucket between network namespaces
    python benchmarks/communication.py --rates 100mbit --seeds 0 --systems ddp diloco

An MLP 784-2000-2000-10 (5.6 million parameters) on the digits, global batch 32, AdamW. The target is the validation
loss that plain DDP has after `--steps` steps, for each seed. Two quantities are measured separately, because they are
independent:

- steps: the run uses an unlimited link and is evaluated every few steps; the first evaluation at or below
  the target counts.
- seconds a step: the same run over the link, without evaluations. DDP may be timed over fewer steps than it needs
  (`--timed`), because its steps are equal; a strategy that synchronizes every few steps is timed over all of its steps.

The time to the target is their product. The network, data, sums and updates are the engine's own, without Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import namespaces  # noqa: E402
from benchmarks.figures import Demand, ratio, spread  # noqa: E402

SYSTEMS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, bf16": {"compression": "bf16"},
    "ddp, fp16": {"compression": "fp16"},
    "ddp, powersgd": {"compression": "powersgd"},
    "local_sgd": {"name": "local_sgd"},
    "diloco": {"name": "diloco"},
    "diloco, bf16": {"name": "diloco", "compression": "bf16"},
    "diloco, bf16, overlapped": {"name": "diloco", "compression": "bf16", "overlap_steps": 5},
}
# (rate, system): required speed-up over ddp.
ASKED = {
    ("1gbit", "ddp, bf16"): Demand(least=1.4),
    ("1gbit", "ddp, fp16"): Demand(least=1.4),
    ("1gbit", "diloco"): Demand(least=3.0),
    ("100mbit", "diloco"): Demand(least=10.0),
}
_APART = [name for name, strategy in SYSTEMS.items() if "name" in strategy]
_EVERY = 5  # steps between two evaluations
_WARM_UP = 5  # steps before the timing starts


# ---- a rank ---------------------------------------------------------------------------------------------------------


def job_of(strategy: dict[str, Any], seed: int, steps: int, evaluate_every: int, lr: float) -> Any:
    from launcher.config import CheckpointConfig, Job, LoggingConfig, ScalingConfig, TrainerConfig
    from launcher.config.schema import StrategyConfig

    return Job(
        model={"_target_": "models.vision.MLP", "width": 2000, "depth": 2},
        data={"_target_": "models.vision_data.Mnist"},
        optimizer={"_target_": "torch.optim.AdamW", "lr": lr},
        strategy=StrategyConfig(**strategy),
        trainer=TrainerConfig(
            steps=steps,
            global_batch_size=32,
            seed=seed,
            log_every=steps,
            evaluate_every=evaluate_every or 10**9,
        ),
        scaling=ScalingConfig(device="cpu"),
        checkpoint=CheckpointConfig(every=10**9, monitor=None),
        logging=LoggingConfig(tensorboard=False, graph=False),
    )


class Clock:
    """The engine's control; records the start time of each step."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def requests(self) -> frozenset[str]:
        self.begun.append(time.perf_counter())
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        pass


def rank(words: str) -> None:
    """Run one rank; rank 0 prints {"losses": {step: validation loss}, "seconds": of each step}."""
    import os

    import torch

    from launcher.engine import entry
    from launcher.engine.runtime import Runtime, ranks_in_environment
    from launcher.runs import RunDirectory

    task = json.loads(words)
    torch.set_num_threads(1)
    directory = RunDirectory(Path(task["folder"]))
    directory.create()
    facts = ranks_in_environment(dict(os.environ))
    assert facts is not None
    runtime, clock = Runtime.from_environment(facts, "cpu"), Clock()
    job = job_of(task["strategy"], task["seed"], task["steps"], task["evaluate_every"], task["lr"])
    entry.run(entry.Task("train", job, str(directory.path), [str(ROOT)], time.time()), runtime, clock)
    runtime.close()
    if runtime.is_first:
        lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
        seconds = [after - before for before, after in zip(clock.begun, clock.begun[1:], strict=False)]
        print(json.dumps({"losses": losses, "seconds": seconds}))


def measure(name: str, seed: int, steps: int, rate: str | None, evaluate_every: int, lr: float) -> dict[str, Any]:
    """Run a system on two hosts and return what its rank 0 printed."""
    with tempfile.TemporaryDirectory(prefix="communication-") as folder, namespaces.network(2, rate) as hosts:
        task = {"strategy": SYSTEMS[name], "seed": seed, "steps": steps, "evaluate_every": evaluate_every, "lr": lr}
        words = json.dumps({**task, "folder": f"{folder}/run"})
        command = [sys.executable, str(Path(__file__).resolve()), "--rank", words]
        printed = namespaces.run(hosts, command, timeout=600)[0]
    return json.loads(printed.strip().splitlines()[-1])


# ---- the whole ------------------------------------------------------------------------------------------------------


def steps_to(losses: dict[str, float], target: float) -> int | None:
    return next((int(step) for step, loss in losses.items() if loss <= target), None)


def compare(options: argparse.Namespace, say: Any) -> list[dict[str, Any]]:
    """Return one row for each (rate, system, seed)."""
    needed: dict[tuple[str, int], int | None] = {}
    for seed in options.seeds:
        losses = measure("ddp", seed, options.steps, None, options.steps, options.lr)["losses"]
        target = losses[str(options.steps)]
        say(f"seed {seed}: ddp has a validation loss of {target:.4f} after {options.steps} steps")
        needed["ddp", seed] = options.steps
        for name in options.systems:
            if name != "ddp":
                found = measure(name, seed, 3 * options.steps // 2, None, _EVERY, options.lr)["losses"]
                needed[name, seed] = steps_to(found, target)
                say(f"seed {seed}: {name} needs {needed[name, seed]} steps")
    rows = []
    for rate in options.rates:
        for seed in options.seeds:
            for name in options.systems:
                if rate != options.rates[0] and name not in ("ddp", *_APART):
                    continue  # its ratio on a slower link follows from the bytes; a measurement takes minutes
                steps = needed[name, seed]
                if steps is None:
                    rows.append({"rate": rate, "system": name, "seed": seed, "steps": None, "seconds": None})
                    continue
                most = options.timed if rate == options.rates[0] else options.timed // 4
                timed = steps if name in _APART else min(steps, most)
                taken = measure(name, seed, timed + _WARM_UP + 1, rate, 0, options.lr)["seconds"][_WARM_UP:]
                each = sum(taken) / len(taken)
                rows.append({"rate": rate, "system": name, "seed": seed, "steps": steps, "seconds": steps * each})
                say(f"{rate}, seed {seed}, {name}: {1000 * each:.0f} ms a step, {steps * each:.1f} s to the target")
    return rows


def table(rows: list[dict[str, Any]], systems: Sequence[str], rates: Sequence[str]) -> tuple[str, bool]:
    """Return the table, and whether all requirements are met."""
    lines = ["| link | system | steps | seconds | steps, times ddp's | faster than ddp | asked |", "| " + "--- | " * 7]
    met = True
    for rate in rates:
        base = [row for row in rows if row["rate"] == rate and row["system"] == "ddp"]
        for name in systems:
            own = [row for row in rows if row["rate"] == rate and row["system"] == name]
            if not own:
                continue
            if any(row["steps"] is None for row in own):
                lines.append(f"| {rate} | {name} | the target was not reached | | | | |")
                met = met and (rate, name) not in ASKED
                continue
            steps, seconds = spread(own, "steps"), spread(own, "seconds")
            more, faster = ratio(own, base, "steps"), ratio(base, own, "seconds")
            demand = ASKED.get((rate, name), Demand())
            met = met and demand.met_by(faster.median)
            cells = [rate, name, steps.text(0), seconds.text(1), more.text(2), faster.text(2)]
            lines.append(f"| {' | '.join([*cells, demand.text(faster.median)])} |")
    return "\n".join(lines), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"])
    parser.add_argument("--systems", nargs="+", default=["ddp", "ddp, bf16", "ddp, fp16", "diloco"], choices=SYSTEMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="of ddp to the target")
    parser.add_argument("--timed", type=int, default=40, help="maximum number of timed steps of a strategy like ddp")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
        return 0
    if "ddp" not in options.systems:
        parser.error("--systems must include ddp, the baseline of the comparison")
    if problem := namespaces.why_not():
        print(problem, file=sys.stderr)
        return 2
    rows = compare(options, lambda text: print(text, file=sys.stderr, flush=True))
    text, met = table(rows, options.systems, options.rates)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "rows": rows}, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
