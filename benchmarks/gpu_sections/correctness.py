"""Compares losses, weights and batches on the device with those of the CPU or of plain PyTorch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_sections.session import (
    ROUNDING,
    SGD,
    Quiet,
    Section,
    Session,
    Trained,
    difference,
    losses_of,
    same_bits,
    weight_difference,
)
from benchmarks.gpu_sections.workload import PicturesOneByOne
from launcher.engine import entry
from launcher.engine.checkpoint import load_weights, newest_intact
from launcher.engine.data import Fetch, Loader
from launcher.engine.order import Key
from launcher.engine.runtime import Runtime
from launcher.runs import RunDirectory

# TF32 rounds the inputs of a product to 10 bits, as bfloat16 and float16 round everything to 8 and 11.
TF32, HALF = 5e-3, 5e-2
CPU_BESIDE_GPU = 1e-4  # other kernels sum in another order in every layer; deterministic mode computes without TF32


def run(session: Session) -> Section:
    """Run every check; losses are compared over the 20 steps of a run."""
    section = Section("right")
    plain = session.train(session.job(), "plain")
    for check in CHECKS:
        with section.going_on(check.__name__.strip("_").replace("_", " ")):
            check(section, session, plain)
    return section


def _other_device(section: Section, session: Session, plain: Trained) -> None:
    """Compare float32 without TF32 on the device with the CPU, in deterministic mode."""
    here = session.train(session.job(deterministic=True), "here")
    there = session.train(session.job(deterministic=True, device="cpu"), "cpu")
    section.at_most("float32 beside the CPU", difference(here.losses, there.losses), CPU_BESIDE_GPU)
    section.at_most(
        "float32 beside deterministic mode",
        difference(plain.losses, here.losses),
        TF32 if session.on_gpu else ROUNDING,
    )


def _precisions(section: Section, session: Session, plain: Trained) -> None:
    for precision in ("bfloat16", "float16"):
        half = session.train(session.job(precision=precision), precision)
        section.at_most(f"{precision} beside float32", difference(half.losses, plain.losses), HALF)
        moved = weight_difference(half.weights, half.observer.history[0])
        section.holds(f"{precision} trains", f"weights moved by {moved:.2g}", "> 0", moved > 0)
        other = half.losses != plain.losses
        section.holds(f"{precision} rounds", "other losses" if other else "the same losses", "other losses", other)


def _compiled(section: Section, session: Session, plain: Trained) -> None:
    if session.tiny:
        return  # a compiler takes longer than all other checks; the stand-in has no kernels to check
    compiled = session.train(session.job(compile=True), "compiled")
    section.at_most("trainer.compile beside eager", difference(compiled.losses, plain.losses), TF32)


def _memory_format(section: Section, session: Session, plain: Trained) -> None:
    assert plain.observer.model is not None
    weight = next(p for p in plain.observer.model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1)
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    section.holds("convolutions compute channels-last", str(last), "True", last)


def _fused(section: Section, session: Session, plain: Trained) -> None:
    for target in (SGD, {"_target_": "torch.optim.AdamW", "lr": 1e-3}):
        name = str(target["_target_"]).rpartition(".")[2]
        fused = plain if target is SGD else session.train(session.job(optimizer=target), f"fused-{name}")
        loop = session.train(session.job(optimizer={**target, "fused": False, "foreach": False}), f"loop-{name}")
        assert fused.observer.optimizer is not None
        used = bool(fused.observer.optimizer.param_groups[0].get("fused"))
        section.holds(f"{name} uses its fused kernel", str(used), "True", used)
        section.at_most(f"{name} fused beside a loop", difference(fused.losses, loop.losses), 1e-4)


def _clipping(section: Section, session: Session, plain: Trained) -> None:
    """Run one step of SGD at rate 1: the distance that the weights move is the norm of the clipped gradient."""
    sgd = {"_target_": "torch.optim.SGD", "lr": 1.0}
    moved = {}
    for norm in (None, 0.1):
        run = session.train(session.job(optimizer=sgd, steps=1, clip_norm=norm), f"clip-{norm}")
        first, last = run.observer.history[0], run.weights
        moved[norm] = float(sum((last[name] - first[name]).square().sum() for name in last)) ** 0.5
    section.at_most("clipping to 0.1, error of the norm", abs(moved[0.1] / 0.1 - 1), 1e-4)
    section.holds("without clipping the norm is larger", f"{moved[None]:.3g}", "> 0.1", moved[None] > 0.1)


def _accumulation(section: Section, session: Session, plain: Trained) -> None:
    """Microbatches of 7 in batches of 50, and in the epoch's last batch of 15: the last microbatch has one sample."""
    parts = session.train(session.job(microbatch_size=7), "accumulated")
    section.at_most(
        "microbatches of 7 in batches of 50",
        difference(parts.losses, plain.losses),
        TF32 if session.on_gpu else ROUNDING,
    )


def _deterministic(section: Section, session: Session, plain: Trained) -> None:
    one, two = (session.train(session.job(deterministic=True), f"deterministic-{n}") for n in (1, 2))
    same = same_bits(one.weights, two.weights) and one.losses == two.losses
    section.holds("deterministic mode twice", "same bits" if same else "other bits", "same bits", same)


def _resume(section: Section, session: Session, plain: Trained) -> None:
    """Compare a run resumed from a checkpoint of each device with an uninterrupted one."""
    whole = session.train(session.job(deterministic=True), "whole")
    first: dict[str, Any] = {"deterministic": True, "steps": session.steps // 2}
    session.train(session.job(**first), "continued")
    rest = session.train(session.job(deterministic=True), "continued")
    same = same_bits(whole.weights, rest.weights) and whole.losses == rest.losses
    section.holds("resume from the device's checkpoint", "same bits" if same else "other bits", "same bits", same)
    session.train(session.job(**first, device="cpu"), "moved")
    moved = session.train(session.job(deterministic=True), "moved")
    section.at_most("resume from a CPU's checkpoint", difference(moved.losses, whole.losses), CPU_BESIDE_GPU)
    back = session.train(session.job(deterministic=True, steps=session.steps + 2, device="cpu"), "continued")
    done, asked = back.result["steps"], session.steps + 2
    section.holds("a CPU resumes the device's checkpoint", f"{done} steps", f"{asked} steps", done == asked)


def _averages(section: Section, session: Session, plain: Trained) -> None:
    decay = 0.9
    ema = {"ema": {"_target_": "launcher.engine.callbacks.Ema", "decay": decay}}
    run = session.train(session.job(callbacks=ema), "ema")
    history = run.observer.history
    average = {name: value.double() for name, value in history[0].items()}
    for update, weights in enumerate(history[1:], 1):
        weight = 1 - min(decay, (1 + update) / (10 + update))
        average = {name: value.lerp(weights[name].double(), weight) for name, value in average.items()}
    newest = newest_intact(run.directory / "checkpoints").path
    assert newest is not None
    saved = load_weights(newest)
    found = {name: saved[name].cpu().double() for name in average}
    section.at_most("EMA beside a hand-written average", weight_difference(found, average), 1e-6)


def _prefetch(section: Section, session: Session, plain: Trained) -> None:
    """Compare the loader's prefetched batches with the data set, and check their device."""
    data = PicturesOneByOne(103, 5)
    keys = [Key(0, 0, torch.randperm(103, generator=torch.Generator().manual_seed(n))[:25]) for n in range(12)]
    fetch = Fetch(data, None, 0)
    wanted = [tuple(torch.stack(column) for column in zip(*[data[int(i)] for i in k], strict=True)) for *_, k in keys]
    wanted = [(x, torch.as_tensor(y)) for x, y in wanted]
    for workers in (0, 2):
        loader = Loader(fetch, session.device, workers)
        right, placed = True, True
        for (x, y), (a, b) in zip(loader.read(iter(keys)), wanted, strict=True):
            # Work for the device, so that copies overlap with it.
            if session.on_gpu:
                torch.mm(*torch.ones(2, 512, 512, device=session.device))
            right = right and torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b)
            placed = placed and x.device.type == y.device.type == session.device.type
        section.holds(
            f"prefetched batches, {workers} loader processes",
            "equal" if right and placed else "on another device" if right else "differ",
            "those of the data set",
            right and placed,
        )


def _sharded(section: Section, session: Session, plain: Trained) -> None:
    alone = session.train(session.job(), "not-sharded")
    with session.one_rank() as runtime:
        sharded = session.train(session.job(strategy={"name": "fsdp"}), "fsdp", runtime)
    section.at_most(
        "fsdp on one device",
        difference(sharded.losses, alone.losses),
        TF32 if session.on_gpu else ROUNDING,
    )
    for where, run in (("ddp", alone), ("fsdp", sharded)):
        elsewhere = _left_behind(run.observer, session.device)
        section.holds(f"{where}: everything is on the device", elsewhere or "yes", "yes", not elsewhere)


def _left_behind(observer: Any, device: torch.device) -> str:
    """Return the tensors of a run's model and optimizer on another device; scalars of the optimizer may be there."""
    found = [name for name, p in observer.model.named_parameters() if p.device.type != device.type]
    found += [name for name, buffer in observer.model.named_buffers() if buffer.device.type != device.type]
    for state in observer.optimizer.state.values():
        found += [
            f"optimizer {key}"
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.device.type != device.type
        ]
    return ", ".join(sorted(set(found)))


def _two_ranks(section: Section, session: Session, plain: Trained) -> None:
    """Run two processes on one device, connected by gloo, in the mode that guarantees the same bits as one."""
    job = session.job(deterministic=True)
    one = session.train(job, "one-rank")
    directory = session.folder / "two-ranks"
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(session.folder), str(directory), job)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    found = losses_of(directory) if codes == [0, 0] else []
    section.at_most("two ranks on one device over gloo", difference(found, one.losses), 0.0)


def _rank(rank: int, folder: str, directory: str, job: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    RunDirectory(Path(directory)).create()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        device = job.scaling.device if job.scaling.device == "cpu" else "cuda:0"
        runtime = Runtime.adopt(rank, 2, rank, 2, device)
        entry.run(entry.Task("train", job, directory, started=time.time()), runtime, Quiet())
    finally:
        dist.destroy_process_group()


CHECKS: tuple[Callable[[Section, Session, Trained], None], ...] = (
    _other_device,
    _precisions,
    _compiled,
    _memory_format,
    _fused,
    _clipping,
    _accumulation,
    _deterministic,
    _resume,
    _averages,
    _prefetch,
    _sharded,
    _two_ranks,
)
