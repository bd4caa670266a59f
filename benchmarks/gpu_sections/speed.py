"""Compares the speed of the engine with a loop written by hand, interleaved, over the same network, data and settings.

The loop follows nanoGPT (https://github.com/karpathy/nanoGPT, train.py): it copies the next batch while the device
computes, uses the fused optimizer, and reads its loss occasionally.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.figures import Demand, Figures, ratio, spread
from benchmarks.gpu_sections.session import WORKLOAD, Section, Session
from benchmarks.gpu_sections.synchronization import Meter, now
from benchmarks.gpu_sections.workload import Tokens, pictures
from launcher.engine.peaks import peak_flops
from models.language import GPT
from models.vision import ResNet18

LOG_EVERY = 10
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
CLIP = 1.0
ROUNDS = 3
NEVER = (10**9, 10**9)  # no step is profiled
# The stand-in shares its cores with other work: it detects slowdowns by a multiple only.
FASTER = {"GPT": Demand(least=1.05), "ResNet-18": Demand(least=1.0), "on the CPU": Demand(least=0.3)}
CHECKPOINT = {True: Demand(most=1.05), False: Demand(most=10.0)}
USED = Demand(least=0.45)


@dataclass(frozen=True)
class Network:
    """The training job, the same for both.

    Attributes:
        samples: x (N, …) and y (N, …) in memory, on the host.
        units: what is counted per second, and how many a sample has.
        first, last: steps between which the time is measured.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    samples: tuple[Tensor, ...]
    build: Any
    precision: str
    compile: bool
    microbatch: int
    accumulate: int
    units: tuple[str, int]
    first: int
    last: int


def networks(tiny: bool) -> list[Network]:
    sizes = {"vocabulary": 50304, "context": 1024, "width": 768, "layers": 12, "heads": 12}
    if tiny:
        sizes = {"vocabulary": 512, "context": 32, "width": 32, "layers": 2, "heads": 2}
    tokens = {"vocabulary": sizes["vocabulary"], "context": sizes["context"], "train": 64 if tiny else 2048}
    picture = {"channels": 1, "size": 28, "width": 8 if tiny else 64}
    count = 128 if tiny else 8192
    return [
        Network(
            "GPT",
            {"_target_": "models.language.GPT", **sizes, "tied": True},
            {"_target_": f"{WORKLOAD}.Tokens", **tokens},
            Tokens(**tokens).train.tensors,
            lambda: GPT(**sizes, tied=True),
            "bfloat16",
            not tiny,
            2 if tiny else 16,
            4,
            ("tokens", sizes["context"]),
            2 if tiny else 15,
            8 if tiny else 65,
        ),
        Network(
            "ResNet-18",
            {"_target_": "models.vision.ResNet18", **picture},
            {"_target_": f"{WORKLOAD}.Pictures", "train": count},
            pictures(count, 1).tensors,
            lambda: ResNet18(**picture),
            "bfloat16",
            False,
            16 if tiny else 512,
            1,
            ("pictures", 1),
            2 if tiny else 20,
            8 if tiny else 120,
        ),
    ]


def run(session: Session) -> Section:
    section = Section("fast")
    for network in networks(session.tiny):
        with section.going_on(network.name):
            _compare(section, session, network)
    with section.going_on("checkpoint"):
        _checkpoint(section, session)
    section.remarks.append(
        "Medians over the rounds (lower quartile … upper quartile), ratios within a round. The utilisation is "
        "(6 N + 12 L T C) FLOPs a token (models/language.py) over the device's dense peak in bfloat16 "
        "(launcher/engine/peaks.py)."
    )
    return section


def _compare(section: Section, session: Session, network: Network) -> None:
    rounds = 1 if session.tiny else ROUNDS
    steps = network.last - network.first
    unit, each = network.units
    done = steps * network.microbatch * network.accumulate * each

    def launch(folder: Any) -> Figures:
        seconds = _launch(session, network, folder.name)
        return {"rate": done / seconds, "seconds": seconds}

    def plain(folder: Any) -> Figures:
        seconds = _plain(session, network)
        return {"rate": done / seconds, "seconds": seconds}

    found = harness.interleave({"launch": launch, "plain loop": plain}, rounds, harness.progress)
    for system, runs in found.items():
        section.figure(f"{network.name}, {system}", f"{spread(runs, 'rate').text(0)} {unit}/s")
        section.figures[f"{network.name}, {system}"] = spread(runs, "rate").to_dict()
    times = ratio(found["launch"], found["plain loop"], "rate")
    demand = FASTER[network.name if session.on_gpu else "on the CPU"]
    section.holds(
        f"{network.name}, launch is faster by",
        f"{times.text(3)} times",
        demand.text(times.median).partition(":")[0],
        demand.met_by(times.median),
    )
    section.figures[f"{network.name}, ratio"] = times.to_dict()
    flops = getattr(network.build(), "flops_per_sample", None)
    peak = peak_flops(torch.cuda.get_device_name(session.device), "bfloat16") if session.on_gpu else None
    if network.name == "GPT" and peak is not None and flops is not None:
        per_sample = flops() if callable(flops) else flops
        used = spread(found["launch"], "rate").median / each * per_sample / peak
        section.holds("GPT, model FLOP utilisation", f"{used:.3f}", f"≥ {USED.least:g}", USED.met_by(used))
        section.figures["GPT, MFU"] = used


def _clear(session: Session) -> None:
    """Reset to the state of a new process: nothing compiled, and no memory of the previous system."""
    torch.compiler.reset()
    if session.on_gpu:
        torch.cuda.empty_cache()


def _launch(session: Session, network: Network, name: str) -> float:
    _clear(session)
    meter = Meter(session.device, network.first, network.last, NEVER)
    job = session.job(
        model=network.model,
        data=network.data,
        optimizer=ADAMW,
        precision=network.precision,
        compile=network.compile,
        global_batch_size=network.microbatch * network.accumulate,
        microbatch_size=network.microbatch,
        clip_norm=CLIP,
        steps=network.last + 1,
        log_every=LOG_EVERY,
    )
    session.train(job, name, control=meter, observed=False)
    return meter.seconds


def _plain(session: Session, network: Network) -> float:
    """Return the seconds between the two steps for a loop by hand."""
    _clear(session)
    torch.manual_seed(0)
    device = session.device
    if session.on_gpu:
        torch.set_float32_matmul_precision("high")
    model: nn.Module = network.build().to(device)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward: Any = torch.compile(model) if network.compile else model
    settings = {key: value for key, value in ADAMW.items() if key != "_target_"}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=True)  # type: ignore[arg-type]
    cast = torch.autocast(device.type, torch.bfloat16) if network.precision == "bfloat16" else nullcontext()
    batches = _random_batches(network, device)
    seconds = float("nan")
    x, y = next(batches)
    for step in range(1, network.last + 1):
        if step == network.first:
            seconds = -now(device)
        elif step == network.last:
            return seconds + now(device)
        for _ in range(network.accumulate):
            with cast:
                logits = forward(x)
                loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), y.flatten()) / network.accumulate
            x, y = next(batches)  # while the device computes
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            loss.item()
    return seconds


def _random_batches(network: Network, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x (B, …) and y (B, …) on the device, of samples drawn at random."""
    x, y = network.samples
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    while True:
        rows = torch.randint(len(x), (network.microbatch,))
        pair = x[rows].contiguous(memory_format=layout), y[rows]
        if device.type == "cuda":
            yield tuple(each.pin_memory().to(device, non_blocking=True) for each in pair)  # type: ignore[misc]
        else:
            yield pair


def _checkpoint(section: Section, session: Session) -> None:
    """Compare 20 steps and a checkpoint with 20 steps, for a perceptron whose weights and AdamW state fill 1 GB."""
    width, layers, every = (64, 2, 5) if session.tiny else (3250, 8, 20)
    batch = 16 if session.tiny else 4096
    found: dict[str, list[float]] = {"none": [], "checkpoint": []}
    for number in range(1 if session.tiny else ROUNDS):
        for kind, runs in found.items():
            # The first save also allocates the memory for copies: it runs before the timing starts.
            meter = Meter(session.device, every + 2, 3 * every + 2, NEVER)
            job = session.job(
                model={"_target_": f"{WORKLOAD}.Perceptron", "width": width, "layers": layers},
                data={"_target_": f"{WORKLOAD}.Rows", "width": width, "train": 2 * batch},
                optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-5},
                checkpoint={"every": every if kind == "checkpoint" else 10**6, "keep": 1, "monitor": None},
                global_batch_size=batch,
                steps=3 * every + 3,
                log_every=every,
            )
            session.train(job, f"{kind}-{number}", control=meter, observed=False)
            runs.append(meter.seconds)
    with_checkpoint, without = ([{"seconds": value} for value in found[kind]] for kind in ("checkpoint", "none"))
    times = ratio(with_checkpoint, without, "seconds")
    demand = CHECKPOINT[session.on_gpu]
    section.holds(
        f"{every} steps and a checkpoint / {every} steps",
        times.text(3),
        f"≤ {demand.most:g}",
        demand.met_by(times.median),
    )
    section.figures["checkpoint, ratio"] = times.to_dict()
