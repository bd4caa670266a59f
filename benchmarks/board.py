"""Measures how long `launch board` takes to answer over a run root with many runs.

    python benchmarks/board.py                  500 runs: five sweeps of 100 trials, 50 logged steps of 12 tags each
    python benchmarks/board.py --sweeps 1 --trials 20 --keep /tmp/tree

The event files are written as a run writes them, with random values. The time starts before the process, and ends when
the server has listed every run, and then for each of two requests: the columns of the HParams tab, and its rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.engine.event_file import EventFile

TAGS = [
    *("train/loss", "train/learning_rate", "train/grad_norm", "val/loss", "val/accuracy"),
    *("throughput/samples_per_second", "throughput/data_wait_fraction", "throughput/mfu"),
    *("memory/allocated_gib", "cluster/workers", "cluster/restarts", "cost/usd"),
]
MOST_SECONDS = 10.0
_LONGEST = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--points", type=int, default=50, help="logged steps of a run")
    parser.add_argument("--keep", type=Path, help="write the run root here, and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        for number in range(options.sweeps):
            write_sweep(root / f"sweep-{number}", options.trials, options.points, seed=number)
        seconds = measure(root, options.sweeps * options.trials)
    runs = options.sweeps * options.trials
    for what, value in seconds.items():
        print(f"{runs} runs, {what}: {value:.1f} s")
    worst = max(seconds.values())
    print(f"at most {MOST_SECONDS:g} s for each: {'yes' if worst <= MOST_SECONDS else 'NO'}")
    sys.exit(worst > MOST_SECONDS)


def write_sweep(directory: Path, trials: int, points: int, seed: int = 0) -> None:
    """Write the event files and results of a sweep."""
    chance = random.Random(seed)
    for number in range(trials):
        run = directory / str(number)
        run.mkdir(parents=True)
        file = EventFile(run, None)
        values = {"optimizer.lr": 10 ** chance.uniform(-4, -1), "model.width": chance.choice([16, 32, 64])}
        file.hyperparameters(values)
        for step in range(1, points + 1):
            file.scalars({tag: math.exp(-step / points) + chance.random() / 10 for tag in TAGS}, step)
        file.close(ended_well=True)
        (run / "result.json").write_text(json.dumps({"status": "completed", "best": {"tag": "val/loss", "value": 0.1}}))
    (directory / "study.journal").touch()


def measure(root: Path, runs: int) -> dict[str, float]:
    """Return the seconds until the server has listed all runs, and of the requests of the HParams tab."""
    command = [sys.executable, "-m", "launcher", "board", f"run.root={root}", "--port", "6123"]
    began = time.monotonic()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        url = next(word for word in line.split() if word.startswith("http://")).partition("?")[0]
        found: dict[str, float] = {}
        while len(_request(f"{url}data/runs") or ()) < runs:
            if server.poll() is not None or time.monotonic() > began + _LONGEST:
                raise SystemExit(f"the server did not list {runs} runs in {_LONGEST:g} s")
            time.sleep(0.1)
        found["listed after"] = time.monotonic() - began
        began = time.monotonic()
        experiment = _request(f"{url}data/plugin/hparams/experiment", {})
        found["columns of HParams"] = time.monotonic() - began
        columns = [{"hparam": info["name"]} for info in experiment["hparamInfos"]]
        columns += [{"metric": info["name"]} for info in experiment["metricInfos"][:5]]
        body = {"colParams": columns, "startIndex": 0, "sliceSize": 100, "allowedStatuses": ["STATUS_SUCCESS"]}
        began = time.monotonic()
        _request(f"{url}data/plugin/hparams/session_groups", body)
        found["rows of HParams"] = time.monotonic() - began
        return found
    finally:
        server.terminate()
        server.wait()


def _request(url: str, body: object = None) -> Any:
    data, headers = (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error} {error.read().decode()}") from None
    except OSError:
        return None


if __name__ == "__main__":
    main()
