"""Measures how long training waits for its images: `throughput/data_wait_fraction` of runs with augmentation.

    python benchmarks/input.py                three runs of each pipeline, interleaved, about three minutes
    python benchmarks/input.py --workers 1    one process

Digits from memory, shifted at random on the device, for the network of `experiment=mnist` and for a ResNet-18 of width
16; and a folder of JPEG files (generated, 96 x 96, color), decoded, scaled, cropped and mirrored by the loader's
processes, for the ResNet-18. Each run logs every 20 steps; the figure is the waiting time over the training time, of
all intervals except the first, which includes the start of the loader's processes and is shown separately.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.figures import Demand, Figures, Report, Spread, spread
from benchmarks.harness import Failed, Measure, torchrun

DEMAND = Demand(most=0.02)
LOG_EVERY = 20
RESNET = ["experiment=resnet"]
FOLDER = [*RESNET, "data=folder", "data.crop_padding=4", "data.flip=true", "model.channels=3", "model.size=32"]
# Words of the command, and steps of a run.
PIPELINES = {
    "digits in memory, shifted on the device; ConvNet": (["experiment=mnist", "data.shift=2"], 400),
    "digits in memory, shifted on the device; ResNet-18": ([*RESNET, "data.shift=2"], 80),
    "folder of JPEG files, cropped and mirrored; ResNet-18": (FOLDER, 80),
}
FILES, SIDE = 1200, 96


def main() -> None:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of a run (default: 400 of the ConvNet, 80 of the ResNet-18)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pictures-") as pictures:
        make_pictures(Path(pictures))
        found = harness.interleave(systems(options, pictures), options.rounds, harness.progress)
    report(options, found).finish(options.json)


def make_pictures(folder: Path) -> None:
    """Generate smooth colors with some noise, so that a JPEG file is about as large as a photograph's."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(FILES):
        place = folder / f"class{number % 4}"
        place.mkdir(exist_ok=True)
        colours = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        soft = np.asarray(colours.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (soft + draw.integers(-12, 13, soft.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number:05}.jpg", quality=90)


def systems(options: argparse.Namespace, pictures: str) -> dict[str, Measure]:
    def measured(words: list[str], steps: int) -> Measure:
        def measure(folder: Path) -> Figures:
            steps_ = options.steps or steps
            command = ["-m", "launcher", *words, f"run.root={folder / 'runs'}", "run.name=run", "scheduler=none"]
            command += [f"trainer.steps={steps_}", f"trainer.log_every={LOG_EVERY}"]
            # Neither evaluation nor saving: both are excluded from the time, and only make the run longer.
            command += [f"trainer.evaluate_every={10 * steps_}", f"checkpoint.every={10 * steps_}"]
            harness.run(torchrun(options.workers, *command), folder)
            return waits(folder / "runs/run/metrics.jsonl")

        return measure

    return {
        name: measured([*words, *([f"data.root={pictures}"] if "data=folder" in words else [])], steps)
        for name, (words, steps) in PIPELINES.items()
    }


def waits(log: Path) -> Figures:
    """Read the log of a run: waiting and rate without the first interval, and the waiting of the first."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    points = [line for line in lines if "throughput/data_wait_fraction" in line and line["step"] % LOG_EVERY == 0]
    if len(points) < 2:
        raise Failed(f"{log} has {len(points)} interval(s) of {LOG_EVERY} steps; two are needed. Train more steps.")
    first, *rest = points
    # All intervals are of as many samples, so each took 1 / rate of it.
    took = [1 / point["throughput/samples_per_second"] for point in rest]
    waited = [seconds * point["throughput/data_wait_fraction"] for seconds, point in zip(took, rest, strict=True)]
    return {
        "waiting": sum(waited) / sum(took),
        "first": first["throughput/data_wait_fraction"],
        "rate": len(took) / sum(took),
    }


def report(options: argparse.Namespace, found: dict[str, list[Figures]]) -> Report:
    settings = {"workers": options.workers, "threads per worker": 1, "global batch": 100, "rounds": options.rounds}
    result = Report("input", settings)
    result.content = {"pipelines": {}}
    for name, runs in found.items():
        waiting, first, rate = (spread(runs, key) for key in ("waiting", "first", "rate"))
        result.rows.append(
            {
                "pipeline": name,
                "samples/s": rate.text(0),
                "waiting": percent(waiting),
                "first interval": percent(first),
                "asked": DEMAND.text(waiting.median).replace("0.02", "2 %"),
            }
        )
        result.content["pipelines"][name] = {
            "waiting": waiting.to_dict() | {"asked": DEMAND.most},
            "first_interval": first.to_dict(),
            "samples_per_second": rate.to_dict(),
        }
    result.remarks.append(
        "Waiting is that of rank 0, as a share of the time of training. Medians over the rounds (lower quartile … "
        "upper quartile). Transforms of whole batches are computing, on the CPU as on a GPU, and no waiting."
    )
    return result


def percent(shares: Spread) -> str:
    return Spread([100 * share for share in shares.values]).text(2) + " %"


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"input: {failure}")
