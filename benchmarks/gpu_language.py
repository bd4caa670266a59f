"""GPT-2 on one GPU: `launch` beside a plain loop in the manner of nanoGPT, over the same network and tokens.

Asked for by `python benchmarks/gpu.py --language`. Both train `models.language.GPT` in bfloat16, compiled, with fused
AdamW, clipped gradients and TF32; in this process, one after the other in each round; without Ray or network access.
The plain loop draws its batches at random from the memory-mapped file, copies the next one while the device computes,
and looks at its loss every ten steps, as https://github.com/karpathy/nanoGPT (train.py) does.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.figures import Demand, Figures, Report, ratio, spread
from benchmarks.harness import Measure
from models.language import GPT
from models.language_data import Tokens

LAUNCH, PLAIN = "launch", "plain loop"
TINY = {"vocabulary": 512, "context": 64, "width": 32, "layers": 2, "heads": 2}  # tries the benchmark itself
GPT2 = {"vocabulary": 50304, "context": 1024, "width": 768, "layers": 12, "heads": 12}
LOG_EVERY = 10
FASTER, USED = Demand(least=1.05), Demand(least=0.45)
RATE, CLIP, BETAS, DECAY = 6e-4, 1.0, (0.9, 0.95), 0.1


def compare(options: argparse.Namespace, device: torch.device | None) -> Report:
    """Measure both, or report that there is nothing to measure on (`device` None)."""
    sizes = TINY if options.tiny else GPT2
    found: dict[str, list[Figures]] = {}
    if device is not None:
        systems = {LAUNCH: launch(options, sizes, device), PLAIN: plain(options, sizes, device)}
        found = harness.interleave(systems, options.rounds, harness.progress)
    return report(options, sizes, device, found)


def write_tokens(folder: Path, sizes: dict[str, int]) -> Path:
    """Random tokens: what they are changes no time."""
    draw = np.random.RandomState(0)
    for part, count in (("train", 2_000 * sizes["context"]), ("val", 2 * sizes["context"])):
        draw.randint(0, sizes["vocabulary"], count).astype("<u2").tofile(folder / f"{part}.bin")
    return folder


def figures(options: argparse.Namespace, sizes: dict[str, int], device: torch.device, seconds: float) -> Figures:
    """What follows from the seconds between the first and the last step that are timed."""
    from launcher.engine.peaks import peak_flops

    steps = options.last - options.first
    tokens = steps * options.batch * options.accumulate * sizes["context"] / seconds
    with torch.device("meta"):
        each = GPT(**sizes, tied=True).flops_per_sample() / sizes["context"]
    peak = peak_flops(torch.cuda.get_device_name(device), "bfloat16") if device.type == "cuda" else None
    used = None if peak is None else tokens * each / peak
    return {"tokens_per_second": tokens, "milliseconds": 1000 * seconds / steps, "mfu": used}


# ---- launch ---------------------------------------------------------------------------------------------------------


def launch(options: argparse.Namespace, sizes: dict[str, int], device: torch.device) -> Measure:
    def measure(folder: Path) -> Figures:
        from benchmarks.gpu import Meter
        from launcher.config import compose
        from launcher.engine import entry
        from launcher.engine.runtime import Runtime
        from launcher.runs import RunDirectory

        steps = options.last + 1
        words = ["experiment=gpt2", f"data.root={write_tokens(folder, sizes)}", "scheduler=none", "cluster=none"]
        words += [f"model.{name}={value}" for name, value in sizes.items()]
        words += [f"data.context={sizes['context']}", f"data.vocabulary={sizes['vocabulary']}"]
        words += [f"optimizer.lr={RATE}", f"trainer.compile={str(options.compile).lower()}", f"trainer.steps={steps}"]
        words += [f"trainer.global_batch_size={options.batch * options.accumulate}"]
        words += [f"trainer.microbatch_size={options.batch}", f"trainer.log_every={LOG_EVERY}"]
        words += [f"trainer.evaluate_every={10 * steps}", f"checkpoint.every={10 * steps}", "logging.graph=false"]
        words += [f"scaling.device={device.type}", "optimizer.groups=[]"]
        clear(device)
        directory = RunDirectory(folder / "run")
        directory.create()
        meter = Meter(device, options.first, options.last, (steps + 1, steps + 2))
        job = compose(words).job
        task = entry.Task("train", job, str(directory.path), started=time.time())
        result = entry.run(task, Runtime.single(device.type), meter)
        return {
            **figures(options, sizes, device, meter.seconds),
            "first_step": result["seconds_to_first_step"],
            "memory_gib": result["metrics"]["memory/allocated_gib"],
            "last_loss": result["metrics"]["train/loss"],
        }

    return measure


# ---- the plain loop -------------------------------------------------------------------------------------------------


def plain(options: argparse.Namespace, sizes: dict[str, int], device: torch.device) -> Measure:
    def measure(folder: Path) -> Figures:
        began = time.time()
        clear(device)
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        train = Tokens(str(write_tokens(folder, sizes)), sizes["vocabulary"], sizes["context"]).train.tokens
        batches = random_batches(train, options.batch, sizes["context"], device)
        raw = GPT(**sizes, tied=True).to(device)
        forward: Any = torch.compile(raw) if options.compile else raw
        optimizer = torch.optim.AdamW(raw.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
        cast = torch.autocast(device.type, torch.bfloat16) if device.type in ("cuda", "cpu") else nullcontext()
        seconds = first_step = last_loss = math.nan
        x, y = next(batches)
        for step in range(1, options.last + 1):
            if step == options.first:
                seconds = -now(device)
            elif step == options.last:
                seconds += now(device)
                break
            loss = torch.zeros(())
            for _ in range(options.accumulate):
                with cast:
                    logits = forward(x)
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
                    loss = loss / options.accumulate
                x, y = next(batches)  # while the device computes
                loss.backward()
            torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % LOG_EVERY == 0 or step == 1:
                last_loss = loss.item() * options.accumulate
            if step == 1:
                first_step = time.time() - began
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return {
            **figures(options, sizes, device, seconds),
            "first_step": first_step,
            "memory_gib": memory,
            "last_loss": last_loss,
        }

    return measure


def random_batches(
    tokens: np.ndarray, batch: int, context: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """x (B, T) and y (B, T) int64 on the device, from places drawn at random."""
    while True:
        starts = torch.randint(len(tokens) - context - 1, (batch,)).tolist()
        rows = torch.from_numpy(np.stack([tokens[at : at + context + 1] for at in starts]).astype(np.int64))
        pair = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if device.type == "cuda":
            x, y = (each.pin_memory().to(device, non_blocking=True) for each in pair)
            yield x, y
        else:
            yield pair


def clear(device: torch.device) -> None:
    """Begin as a new process would: nothing compiled, and no memory of the system before."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- telling --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "tokens/s": ("tokens_per_second", 0),
    "ms a step": ("milliseconds", 2),
    "MFU": ("mfu", 3),
    "to the first step, s": ("first_step", 1),
    "memory, GiB": ("memory_gib", 2),
}


def report(
    options: argparse.Namespace, sizes: dict[str, int], device: torch.device | None, found: dict[str, list[Figures]]
) -> Report:
    from benchmarks.gpu import device_name

    with torch.device("meta"):
        network = GPT(**sizes, tied=True)
    settings = {
        "device": device_name(options.device),
        "network": f"GPT of {sum(p.numel() for p in network.parameters()):,} parameters, context {sizes['context']}",
        "a step": f"{options.accumulate} x {options.batch} sequences",
        "compiled": "yes" if options.compile else "no",
        "timed": f"steps {options.first} to {options.last}",
        "rounds": options.rounds,
    }
    result = Report("gpu", settings)
    result.content = {"systems": {}, "flops_per_token": network.flops_per_sample() / sizes["context"]}
    for name in (LAUNCH, PLAIN):
        runs = found.get(name)
        known = {key: bool(runs) and runs[0][key] is not None for key, _ in COLUMNS.values()} if runs else {}
        spreads = {key: spread(runs, key) if runs and known[key] else None for key, _ in COLUMNS.values()}
        texts = {
            head: figure.text(digits) if (figure := spreads[key]) else "–" for head, (key, digits) in COLUMNS.items()
        }
        used = spreads["mfu"]
        asked = USED.text(used.median) if used is not None and name == LAUNCH and "H100" in settings["device"] else ""
        result.rows.append({"system": name, **texts, "MFU asked": asked, "launch is faster by": "", "asked": ""})
        result.content["systems"][name] = {key: one.to_dict() if one else None for key, one in spreads.items()} | {
            "last_loss": runs[-1]["last_loss"] if runs else None
        }
    result.content["ratio"] = None
    if found:
        times = ratio(found[LAUNCH], found[PLAIN], "tokens_per_second")
        result.rows[1] |= {"launch is faster by": f"{times.text(3)} times", "asked": FASTER.text(times.median)}
        result.content["ratio"] = times.to_dict() | {"asked": FASTER.least}
    if device is None:
        result.remarks.append("There is no GPU that PyTorch can use on this machine: all figures are left empty.")
    elif device.type == "cpu":
        result.remarks.append("On the CPU this only shows that the benchmark works; nothing follows for a GPU.")
    result.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile). MFU: (6 N + 12 L T C) FLOPs a token, see "
        "models/language.py, over the device's dense peak in bfloat16, launcher/engine/peaks.py."
    )
    return result
