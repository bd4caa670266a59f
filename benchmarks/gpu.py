"""The engine on one GPU, without Ray and without a network: precisions, compilation, and synchronisations between logs.

    python benchmarks/gpu.py                                        all variants, three rounds
    python benchmarks/gpu.py --networks resnet18 --variants bfloat16 bfloat16,compile --batch 512
    python benchmarks/gpu.py --language                             GPT-2 beside a plain loop, see gpu_language.py

Each variant trains the digits in this process through `launcher.engine`, as `launch cluster=none` does, with
TensorBoard on. Time is taken over steps in the middle, logging included. Then some steps between two logs are profiled:
whatever stops the host until the device has caught up is counted there, and none is wanted. Without a GPU the figures
stay empty.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import gpu_language, harness
from benchmarks.figures import Figures, Report, spread
from benchmarks.harness import Failed, Measure

NETWORKS = {"convnet": [], "resnet18": ["model.channels=1", "model.size=28"]}
VARIANTS = ("float32", "bfloat16", "float16", "float32,compile", "bfloat16,compile")
LOG_EVERY = 50
# What the host waits in, as the profiler calls it. `.item()` on a GPU tensor ends in one of them.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# What asks for a number on the host; harmless on a CPU tensor, so it is shown beside the waits and not among them.
READS = ("aten::_local_scalar_dense", "aten::nonzero")
BEGIN, END = "benchmark: begin", "benchmark: end"


def main() -> None:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, help="samples at a time (default 256; with --language 16)")
    parser.add_argument("--first", type=int, help="the step at which the time begins (default 100; 20)")
    parser.add_argument("--last", type=int, help="the step at which it ends (default 400; 120)")
    parser.add_argument("--profiled", type=int, default=20, help="steps that are profiled after it (default 20)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the benchmark itself")
    parser.add_argument("--language", action="store_true", help="compare GPT-2 with a plain loop instead")
    parser.add_argument("--accumulate", type=int, default=4, help="--language: microbatches in a step (default 4)")
    parser.add_argument("--tiny", action="store_true", help="--language: a network of a few thousand weights")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="--language: as it stands")
    options = parser.parse_args()
    usual = {"batch": 16, "first": 20, "last": 120} if options.language else {"batch": 256, "first": 100, "last": 400}
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 < options.first < options.last or not 0 < options.profiled < LOG_EVERY - 2:
        parser.error(f"--first must lie above 0 and below --last, --profiled above 0 and below {LOG_EVERY - 2}")
    usable = options.device == "cpu" or torch.cuda.is_available()
    if options.language:
        device = torch.device("cpu" if options.device == "cpu" else "cuda:0") if usable else None
        gpu_language.compare(options, device).finish(options.json)
        return
    variants = list(itertools.product(options.networks, options.variants))
    found: dict[str, list[Figures]] = {}
    if usable:
        systems = {label(*variant): engine(options, *variant) for variant in variants}
        found = harness.interleave(systems, options.rounds, harness.progress)
    report(options, variants, found).finish(options.json)


def label(network: str, variant: str) -> str:
    return f"{network}, {variant}"


# ---- measuring ------------------------------------------------------------------------------------------------------


class Meter:
    """The engine's control (`launcher.engine.control.Control`), asked at the beginning of every step: so it keeps time.

    Args:
        first, last: steps between which the time is taken.
        profiled: (first, last) of the steps under the profiler; no log may lie between them.
    """

    def __init__(self, device: torch.device, first: int, last: int, profiled: tuple[int, int]) -> None:
        self._device = device
        self._first, self._last, self._profiled = first, last, profiled
        self._step = 0
        self._began = 0.0
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(activities=activities)
        self.seconds = math.nan
        self.counts: Counter[str] = Counter()

    def requests(self) -> frozenset[str]:
        self._step += 1
        if self._step == self._first:
            self._began = self._now()
        elif self._step == self._last:
            self.seconds = self._now() - self._began
        elif self._step == self._profiled[0]:
            self._profile.start()
            with record_function(BEGIN):
                pass
        elif self._step == self._profiled[1]:
            with record_function(END):
                pass
            self._profile.stop()
            self.counts = count(self._profile.events() or [])
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        """Nobody watches."""

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def count(events: Iterable[Any]) -> Counter[str]:
    """How often each of WAITS and READS was called between the marks BEGIN and END; the profiler itself waits as well.

    Args:
        events: the profiler's, each with `name` and `time_range.start` and `.end`.

    Raises:
        Failed: a mark is missing.
    """
    listed = list(events)
    begins = [event.time_range.end for event in listed if event.name == BEGIN]
    ends = [event.time_range.start for event in listed if event.name == END]
    if not begins or not ends:
        raise Failed("the profiler lost the marks around the steps")
    return Counter(
        event.name for event in listed if event.name in WAITS + READS and begins[0] <= event.time_range.start < ends[-1]
    )


def engine(options: argparse.Namespace, network: str, variant: str) -> Measure:
    def measure(folder: Path) -> Figures:
        from launcher.config import compose
        from launcher.engine import entry
        from launcher.engine.runtime import Runtime
        from launcher.runs import RunDirectory

        precision, _, compiled = variant.partition(",")
        start = (options.last // LOG_EVERY + 1) * LOG_EVERY + 2  # just behind a log
        steps = start + options.profiled + 1
        words = ["experiment=mnist", f"model={network}", *NETWORKS[network], "scheduler=none", "optimizer.lr=1e-3"]
        words += [f"trainer.precision={precision}", f"trainer.compile={str(bool(compiled)).lower()}", "cluster=none"]
        words += [f"trainer.global_batch_size={options.batch}", f"trainer.steps={steps}"]
        words += [f"trainer.log_every={LOG_EVERY}", f"trainer.evaluate_every={10 * steps}"]
        words += [f"checkpoint.every={10 * steps}", f"scaling.device={options.device}"]
        runtime = Runtime.single(options.device)
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)
        torch.compiler.reset()
        directory = RunDirectory(folder / "run")
        directory.create()
        meter = Meter(runtime.device, options.first, options.last, (start, start + options.profiled))
        job = compose(words).job
        result = entry.run(entry.Task("train", job, str(directory.path), started=time.time()), runtime, meter)
        rate = (options.last - options.first) / meter.seconds
        return {
            "samples_per_second": rate * options.batch,
            "milliseconds": 1000 / rate,
            "waits": sum(meter.counts[name] for name in WAITS) / options.profiled,
            "reads": sum(meter.counts[name] for name in READS) / options.profiled,
            "memory_gib": result["metrics"]["memory/allocated_gib"],
            "last_loss": result["metrics"]["train/loss"],
            "counts": dict(meter.counts),
        }

    return measure


# ---- telling --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "samples/s": ("samples_per_second", 0),
    "ms a step": ("milliseconds", 2),
    "waits a step": ("waits", 2),
    "reads a step": ("reads", 2),
    "memory, GiB": ("memory_gib", 2),
}


def report(options: argparse.Namespace, variants: list[tuple[str, str]], found: dict[str, list[Figures]]) -> Report:
    settings = {
        "device": device_name(options.device),
        "batch": options.batch,
        "timed": f"steps {options.first} to {options.last}",
        "profiled": f"{options.profiled} steps between two logs",
        "rounds": options.rounds,
    }
    result = Report("gpu", settings)
    result.content = {"variants": {}}
    for network, variant in variants:
        runs = found.get(label(network, variant))
        figures = {key: spread(runs, key) if runs else None for key, _ in COLUMNS.values()}
        texts = {
            head: figure.text(digits) if (figure := figures[key]) else "–" for head, (key, digits) in COLUMNS.items()
        }
        result.rows.append({"network": network, "variant": variant, **texts})
        result.content["variants"][label(network, variant)] = {
            **{key: figure.to_dict() if figure else None for key, figure in figures.items()},
            "counts": runs[-1]["counts"] if runs else None,
        }
    if not found:
        result.remarks.append("There is no GPU that PyTorch can use on this machine: all figures are left empty.")
    elif options.device == "cpu":
        result.remarks.append("On the CPU this only shows that the benchmark works; nothing waits for a device there.")
    result.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile). "
        f"Waits are {', '.join(WAITS)}, reads {', '.join(READS)}."
    )
    return result


def device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU as a stand-in"
    if not torch.cuda.is_available():
        return "none found"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"gpu: {failure}")
