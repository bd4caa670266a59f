"""Compares the memory that `launch plan` predicts for a worker with the peak of training."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sections.session import CONVNET, PICTURES, WORKLOAD, Quiet, Section, Session
from benchmarks.gpu_sections.workload import Observer
from launcher.config import Job
from launcher.config.schema import ClusterConfig

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-4}
LEAST, MOST = 0.75, 1.25  # prediction / peak
VM = "Standard_NC40ads_H100_v5"  # the prediction does not depend on it


def run(session: Session) -> Section:
    section = Section("fits")
    for name, sections, batches in networks(session.tiny):
        for precision in ("float32", "bfloat16"):
            for batch in batches:
                row = f"{name}, {precision}, batch {batch}"
                if row.startswith("ConvNet, bfloat16") and not session.on_gpu:
                    continue  # strided convolutions convert their gradients to float32 on a CPU (measured: 0.72)
                with section.going_on(row):
                    job = session.job(
                        **sections, optimizer=ADAMW, precision=precision, global_batch_size=batch, steps=3, log_every=3
                    )
                    predicted, peak = predict(job), measure(session, job, row.replace(", ", "-").replace(" ", "-"))
                    ratio = predicted / peak
                    section.figures[row] = {"predicted": predicted, "peak": peak}
                    section.holds(
                        row,
                        f"{predicted / 2**20:.1f} of {peak / 2**20:.1f} MiB: {ratio:.2f}",
                        f"{LEAST:g} to {MOST:g}",
                        LEAST <= ratio <= MOST,
                    )
    return section


def networks(tiny: bool) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """Return the networks: name, sections of the job, batches."""
    width, layers, context = (256, 4, 64) if tiny else (4096, 8, 1024)
    gpt = {"vocabulary": 512, "context": context, "width": 64 if tiny else 768, "layers": 2 if tiny else 12}
    resnet = {"_target_": "models.vision.ResNet18", "channels": 1, "size": 28, "width": 8 if tiny else 64}
    return [
        (
            "perceptron",
            {
                "model": {"_target_": f"{WORKLOAD}.Perceptron", "width": width, "layers": layers},
                "data": {"_target_": f"{WORKLOAD}.Rows", "width": width},
            },
            (16, 128),
        ),
        ("ConvNet", {"model": CONVNET, "data": PICTURES}, (64,) if tiny else (128, 512)),
        ("ResNet-18", {"model": resnet, "data": PICTURES}, (16,) if tiny else (64, 256)),
        (
            "GPT",
            {
                "model": {"_target_": "models.language.GPT", **gpt, "heads": 2 if tiny else 12},
                "data": {"_target_": f"{WORKLOAD}.Tokens", "vocabulary": 512, "context": context},
            },
            (4, 16),
        ),
    ]


def predict(job: Job) -> int:
    """Return the bytes that `launch plan` predicts for the job on one VM with one GPU."""
    from launcher.planning.nodes import make_node_plan

    cluster = ClusterConfig(kind="azure", size=VM, nodes=1)
    elsewhere = replace(job, cluster=cluster, scaling=replace(job.scaling, device="auto", workers=1), callbacks={})
    return make_node_plan(elsewhere, ask=False).forecast.needs


def measure(session: Session, job: Job, name: str) -> int:
    """Return the peak of allocated bytes during training.

    PyTorch counts them on a GPU. On the CPU, where the process memory also includes the data and other Python objects,
    it is the memory of the run at the start of its second step plus the growth in that step.
    """
    gc.collect()
    if session.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)
        session.train(job, name, observed=False)
        return torch.cuda.max_memory_allocated(session.device) - before
    added = Added(session.folder / f"{name}.json")
    session.train(job, name, control=added, observed=False)
    return added.kept + added.peak


class Added(Quiet):
    """The engine's control. It records the growth of the process memory in the second step.

    Attributes:
        kept: bytes of weights, gradients and optimizer state when the step begins.
        peak: maximum bytes that the step allocates in addition.
    """

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self._step = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.kept = self.peak = 0

    def requests(self) -> frozenset[str]:
        self._step += 1
        if self._step == 2:
            model, optimizer = Observer.latest.model, Observer.latest.optimizer
            assert model is not None
            assert optimizer is not None
            tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
            tensors += [value for state in optimizer.state.values() for value in state.values()]
            self.kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            self._profile.start()
        elif self._step == 3:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._trace))
            events = json.loads(self._trace.read_text())["traceEvents"]
            self._trace.unlink()
            levels = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
            first = next(event["args"] for event in events if event.get("name") == "[memory]")
            self.peak = max(levels) - (first["Total Allocated"] - first["Bytes"])
        return frozenset()
