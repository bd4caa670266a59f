"""Compares one sweep, 16 single launches and Ray Tune on 16 trials of two-worker DDP (MNIST digits, one epoch each).

    python benchmarks/sweep.py                 # about ten minutes on two cores; prints JSON
    python benchmarks/sweep.py --trials 4      # a quick look

All three train the same jobs through the same engine, on all cores of this machine, within one run of this program;
half of the single launches run before and half after, so that a machine that slows down in between favors no system.
Ray Tune runs a function per trial that starts a TorchTrainer of two workers. If that exceeds the time limit, Tune runs
the same number of trials with one worker each instead, as many at a time as there are cores, and the result states it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = ("experiment=mnist", "trainer.epochs=1")


def rates(trials: int) -> list[str]:
    return [f"{1e-4 * 100 ** (index / max(1, trials - 1)):.3g}" for index in range(trials)]


def launch(*words: str) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=1200,
    )
    return time.perf_counter() - begun


def objectives(root: Path, trials: int) -> list[float]:
    files = [root / "sweep" / str(number) / "result.json" for number in range(trials)]
    return [json.loads(file.read_text())["metrics"]["val/loss"] for file in files]


# ---- Ray Tune -------------------------------------------------------------------------------------------------------


def tune(trials: int, root: Path, nested: bool) -> None:
    """Run the trials with Ray Tune; called in a separate process."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    import ray.train
    import ray.train.torch
    import ray.tune

    ray.init(
        address="local",  # ignores any other Ray on this machine
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )

    def trial(config: dict[str, Any]) -> None:
        if not nested:
            _train_here(config, root)
            return
        ray.train.torch.TorchTrainer(
            _train_here_as_worker,
            train_loop_config={**config, "root": str(root)},
            # On two cores the driver of a trial needs some CPU, and must not take a core from its own workers.
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.99}),
            run_config=ray.train.RunConfig(storage_path=str(root), name=f"tune-{config['lr']}"),
        ).fit()

    def _train_here(config: dict[str, Any], root: Path) -> None:
        _train(config["lr"], root, rank=0, world_size=1)

    def _train_here_as_worker(config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        _train(config["lr"], Path(config["root"]), context.get_world_rank(), context.get_world_size())

    def _train(lr: float, root: Path, rank: int, world_size: int) -> None:
        sys.path.insert(0, str(ROOT))
        from launcher.config import compose
        from launcher.engine.entry import Task, run
        from launcher.engine.runtime import Runtime

        class Silent:
            def requests(self) -> frozenset[str]:
                return frozenset()

            def emit(self, event: dict[str, Any]) -> None:
                pass

        directory = root / f"trial-{lr}"
        directory.mkdir(exist_ok=True)
        job = compose([*JOB, f"optimizer.lr={lr}"]).job
        task = Task("train", job, str(directory), [str(ROOT)], time.time())
        run(task, Runtime.adopt(rank, world_size, rank, world_size, "cpu"), Silent())

    ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.01 if nested else 1}),
        param_space={"lr": ray.tune.grid_search([float(rate) for rate in rates(trials)])},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=max(1, (os.cpu_count() or 2) // 2) if nested else None),
        run_config=ray.tune.RunConfig(storage_path=str(root), name="tune", verbose=0),
    ).fit()
    done = [path for path in root.glob("trial-*/result.json") if json.loads(path.read_text())["status"] == "completed"]
    if len(done) != trials:
        raise SystemExit(f"{len(done)} of {trials} trials ended")


def time_tune(trials: int, limit: float) -> dict[str, Any]:
    for nested in (True, False):
        root = Path(tempfile.mkdtemp(prefix="tune-"))
        arguments = ["--tune", "nested" if nested else "single", "--root", str(root), "--trials", str(trials)]
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            errors = b"did not end in time"
        seconds = time.perf_counter() - begun
        shutil.rmtree(root, ignore_errors=True)
        what = "nested TorchTrainers of 2 workers" if nested else "single-worker trials"
        if process.returncode == 0:
            return {"seconds": round(seconds, 1), "what": what}
        print(f"Ray Tune with {what}: {errors.decode()[-300:]}", file=sys.stderr)
        time.sleep(5)
    return {"seconds": None, "what": "neither ended"}


# ---- all of it ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--limit", type=float, default=900, help="seconds that Ray Tune may take")
    parser.add_argument("--tune", choices=("nested", "single"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tune:
        tune(asked.trials, asked.root, asked.tune == "nested")
        return
    values = rates(asked.trials)
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        root = Path(scratch)
        place = f"run.root={root}"
        half = len(values) // 2
        singles = [launch(*JOB, f"optimizer.lr={value}", place, f"run.name=single-{value}") for value in values[:half]]
        sweep = launch("-m", *JOB, f"optimizer.lr={','.join(values)}", place, "run.name=sweep")
        found = time_tune(asked.trials, asked.limit)
        singles += [launch(*JOB, f"optimizer.lr={value}", place, f"run.name=single-{value}") for value in values[half:]]
        alone = [
            json.loads((root / f"single-{value}" / "result.json").read_text())["metrics"]["val/loss"]
            for value in values
        ]
        same = alone == objectives(root, asked.trials)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result: dict[str, Any] = {
        "trials": asked.trials,
        "sweep_seconds": round(sweep, 1),
        "single_launches_seconds": round(sum(singles), 1),
        "sweep_to_singles": round(sweep / sum(singles), 3),
        "ray_tune": found,
        "sweep_to_ray_tune": round(sweep / found["seconds"], 3) if found["seconds"] else None,
        "same_numbers_as_single_launches": same,
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "commit": commit.strip(),
        "date": str(datetime.date.today()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
