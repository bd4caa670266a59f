"""What a lost worker costs a run that heals in place: kills one after another, and compares with a run left alone.

    python benchmarks/healing.py --kills 20 --every 15

Rank 0 and others are killed in turn. For every kill: how long no step was done around it, and again when its
replacement joined; at the end whether the weights and every logged value are those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACE = 0.4  # seconds from step to step, at least
_OF_THE_MACHINE = ("throughput/", "memory/", "cluster/", "time")


class Paced:
    """A callback: steps of a known length, and who computes them."""

    def __init__(self, seconds: float = PACE) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def on_start(self, run: Any) -> None:
        folder = run.directory / "workers"
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).touch()

    def on_step(self, run: Any) -> None:
        if run.rank == 0:
            own = run.directory / f"first.{os.getpid()}"
            own.write_text(str(os.getpid()))
            own.replace(run.directory / "first")
        time.sleep(max(0.0, self.last + self.seconds - time.monotonic()))
        self.last = time.monotonic()


@dataclass(frozen=True)
class Kill:
    """`gap`, `joining`: seconds without a step around the kill, and when the replacement joined (None: it did not)."""

    time: float
    rank_0: bool
    gap: float
    joining: float | None


@dataclass(frozen=True)
class Outcome:
    result: dict[str, Any]
    kills: list[Kill]
    pace: float  # median seconds from step to step
    same: bool  # as the undisturbed run, in every logged value and every bit of the weights


def measure(kills: int, every: float, workers: int = 3) -> Outcome:
    """Run a job and kill a worker every so many seconds.

    Raises:
        RuntimeError: a run failed, or it was over before the last kill.
    """
    # Where others use the machine too, a replacement needs longer than `every`, and the next kill waits for it.
    steps = int((kills + 1) * every * 1.5 / PACE)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        times = _disturbed(root, kills, every, steps, workers)
        alone = _command(root, "alone", steps, 0.0, ["cluster=none"])
        subprocess.run(alone, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return _evaluate(root, times)


def _command(root: Path, name: str, steps: int, pace: float, words: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "launcher", "experiment=mnist_tiny", f"run.root={root}", f"run.name={name}"),
        *(f"trainer.steps={steps}", "trainer.deterministic=true", "trainer.log_every=1", "trainer.evaluate_every=100"),
        *("checkpoint.every=100", f"+callbacks.paced={{_target_: benchmarks.healing.Paced, seconds: {pace}}}"),
        *("logging.graph=false", *words),
    ]


def _disturbed(root: Path, kills: int, every: float, steps: int, workers: int) -> list[tuple[float, bool]]:
    words = ["cluster=local", f"scaling.workers={workers}", "scaling.cpus_per_worker=0.5", "scaling.heal=true"]
    directory = root / "healed"
    times: list[tuple[float, bool]] = []
    with (root / "output").open("w+") as output:
        process = subprocess.Popen(
            _command(root, "healed", steps, PACE, words), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                living = _living(directory)
                if len(living) >= workers and len(times) < kills and (not times or times[-1][0] + every < time.time()):
                    if not times:
                        time.sleep(every / 3)
                    first = int((directory / "first").read_text())
                    rank_0 = len(times) % workers == 0
                    victim = first if rank_0 else next(pid for pid in living if pid != first)
                    times.append((time.time(), rank_0))
                    os.kill(victim, signal.SIGKILL)
                time.sleep(0.05)
        finally:
            process.kill()
        if process.returncode or len(times) < kills:
            output.seek(0)
            raise RuntimeError(f"status {process.returncode} after {len(times)} kills:\n{output.read()[-3000:]}")
    return times


def _living(directory: Path) -> list[int]:
    """Return the processes that train, the newest last."""
    files = sorted((directory / "workers").glob("*"), key=lambda file: file.stat().st_mtime)
    return [int(file.name) for file in files if _state(int(file.name)) not in "Z"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _evaluate(root: Path, times: list[tuple[float, bool]]) -> Outcome:
    from launcher.engine.checkpoint import load_weights, newest_intact

    healed, alone = (_lines(root / name) for name in ("healed", "alone"))
    same = [_kept(line) for line in healed] == [_kept(line) for line in alone]
    weights = []
    for name in ("healed", "alone"):
        path = newest_intact(root / name / "checkpoints").path
        assert path is not None
        weights.append(load_weights(path))
    same = same and all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[1])
    ends = [one for one, _ in times[1:]] + [float("inf")]
    pairs = list(itertools.pairwise(healed))
    found = []
    for (killed, rank_0), end in zip(times, ends, strict=True):
        gap = 0.0
        for a, b in pairs:
            if killed < b["time"] < end:
                gap = max(gap, b["time"] - a["time"])
                if b["cluster/workers"] < a["cluster/workers"]:  # the step that was done again by those who are left
                    break
        joined = [
            b["time"] - a["time"]
            for a, b in pairs
            if killed < a["time"] < end and a["cluster/workers"] < b["cluster/workers"]
        ]
        found.append(Kill(killed, rank_0, gap, joined[0] if joined else None))
    pace = statistics.median(b["time"] - a["time"] for a, b in pairs)
    return Outcome(json.loads((root / "healed" / "result.json").read_text()), found, pace, same)


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _kept(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(_OF_THE_MACHINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, default=15.0, help="seconds from one kill to the next")
    arguments = parser.parse_args()
    outcome = measure(arguments.kills, arguments.every)
    print("kill  whom    gap s  joining s")
    for number, kill in enumerate(outcome.kills, 1):
        joining = "-" if kill.joining is None else f"{kill.joining:.2f}"
        print(f"{number:4}  {'rank 0' if kill.rank_0 else 'other ':6} {kill.gap:6.2f} {joining:>9}")
    gaps = [kill.gap for kill in outcome.kills]
    both = [kill.gap + (kill.joining or 0.0) for kill in outcome.kills]
    print(f"a step every {outcome.pace:.2f} s; median gap {statistics.median(gaps):.2f} s, at most {max(gaps):.2f} s;")
    print(f"with the joining median {statistics.median(both):.2f} s")
    print({key: outcome.result[key] for key in ("status", "steps", "samples", "restarts", "lost_steps", "seconds")})
    print(
        "weights and logged values are those of the undisturbed run" if outcome.same else "DIFFERENT from undisturbed"
    )


if __name__ == "__main__":
    main()
