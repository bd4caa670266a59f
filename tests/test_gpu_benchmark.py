"""The GPU benchmark on the CPU: every section runs, and fails if the part of the engine that it checks is broken."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import gpu, harness
from benchmarks.gpu_sections import correctness, memory, speed, synchronization
from benchmarks.gpu_sections.session import Section, Session
from benchmarks.harness import Failed
from launcher.engine import build, optim
from launcher.engine.callbacks import Ema
from launcher.engine.checkpoint import Checkpointer
from launcher.engine.data import Loader
from launcher.engine.order import Split
from launcher.engine.state import State
from launcher.engine.strategies import fsdp, strategy
from launcher.engine.strategies.ddp import DataParallel
from launcher.planning import nodes
from models import vision

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # one thread: the networks are tiny
    yield Session(torch.device("cpu"), True, tmp_path)
    torch.set_num_threads(threads)


def run_command(folder: Path, *words: str, **environment: str) -> tuple[Any, str, int]:
    file = folder / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words, "--json", str(file)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=harness.surroundings() | environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert file.exists(), done.stderr
    return json.loads(file.read_text()), done.stdout, done.returncode


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    found, printed, status = run_command(tmp_path, "--device", "cpu", "--tiny")
    assert list(found["sections"]) == list(gpu.SECTIONS)
    for name, section in found["sections"].items():
        assert all(row["check"] in printed for row in section["rows"]), name
        if name != "fast":  # durations are not compared on a machine with other work
            assert section["failures"] == [], name
    assert {name for name in found["sections"]["fast"]["figures"] if name.endswith("ratio")} == {
        "GPT, ratio",
        "ResNet-18, ratio",
        "checkpoint, ratio",
    }
    assert status == (1 if found["sections"]["fast"]["failures"] else 0)


def test_without_a_gpu_every_table_is_empty_and_the_reason_is_printed(tmp_path: Path) -> None:
    found, printed, status = run_command(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert status == 0
    assert printed.count(gpu.NONE) == len(gpu.SECTIONS)
    assert all(section["rows"] == [] and section["figures"] == {} for section in found["sections"].values())


def test_a_section_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Session) -> Section:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "run", broken)
    monkeypatch.setattr(memory, "run", lambda session: Section("fits"))
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)
    options = argparse.Namespace(only=["right", "fits"], device="cpu", tiny=True)
    found = gpu.measure(options)["sections"]
    assert found["right"]["failures"] == ["the section itself"]
    assert found["fits"]["failures"] == []


def test_the_page_shows_the_recorded_figures() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    assert gpu.PAGE.read_text() == gpu.page(recorded)


def test_the_page_shows_every_check() -> None:
    section = Section("fits")
    section.at_most("memory", 2.0, 1.0)
    row = {"rows": [check.to_row() for check in section.checks], "remarks": ["A remark."], "seconds": 3.0}
    environment = {"date": "2026-11-30", "commit": "abc", "machine": "m", "versions": {"torch": "2"}}
    shown = gpu.page({"environment": environment, "device": "H100", "sections": {"fits": row}})
    assert "| memory | 2     | ≤ 1   | FAILED  |" in shown
    assert "A remark." in shown
    assert "H100" in shown


# ---- each section fails if the engine is broken - ------------------------------------------------------------------


def noisy(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A network whose results differ in each call, as those of kernels with atomic additions do."""
    return lambda self, x: forward(self, x) + 1e-2 * torch.randn(10, generator=_from_the_clock())


def _from_the_clock() -> torch.Generator:
    return torch.Generator().manual_seed(time.perf_counter_ns())


def forgetful(load: Callable[..., None]) -> Callable[..., None]:
    def load_most(self: Any, path: Path) -> None:
        load(self, path)
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()

    return load_most


def exits(rank: int, *how: Any) -> None:
    sys.exit(3)


def one_sample_less(share: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *how: [(start, max(start + 1, stop - 1)) for start, stop in share(self, *how)]


BROKEN: dict[str, tuple[Any, Any, str, Any]] = {
    "another device computes otherwise": (
        correctness._other_device,
        vision.ConvNet,
        "forward",
        noisy(vision.ConvNet.forward),
    ),
    "precision is ignored": (
        correctness._precisions,
        strategy,
        "casting",
        lambda device, precision: nullcontext(),
    ),
    "memory format is ignored": (correctness._memory_format, build, "has_convolutions", lambda model: False),
    "no fused kernel": (correctness._fused, optim, "_can_fuse", lambda *how: False),
    "no clipping": (correctness._clipping, nn.utils, "clip_grads_with_norm_", lambda *how: None),
    "samples are left out of microbatches": (
        correctness._accumulation,
        Split,
        "share",
        one_sample_less(Split.share),
    ),
    "deterministic mode is not": (
        correctness._deterministic,
        vision.ConvNet,
        "forward",
        noisy(vision.ConvNet.forward),
    ),
    "a resume forgets the momentum": (
        correctness._resume,
        State,
        "load",
        forgetful(State.load),
    ),
    "the average has another decay": (
        correctness._averages,
        Ema,
        "weights",
        lambda self: {name: 1.001 * value for name, value in self._averages.items()},
    ),
    "a batch is overwritten": (
        correctness._prefetch,
        Loader,
        "_placed",
        lambda self, batch: [part.flip(0) for part in batch],
    ),
    "fsdp sums otherwise": (
        correctness._sharded,
        fsdp,
        "scale_by_count",
        lambda grads, size, count: torch._foreach_mul_(grads, 1.01),
    ),
    "a rank dies": (correctness._two_ranks, correctness, "_rank", exits),
}


@pytest.mark.parametrize("what", BROKEN)
def test_right_fails_if_the_engine_is_wrong(what: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    check, owner, name, replacement = BROKEN[what]
    plain = session.train(session.job(), "plain")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        if check is correctness._memory_format:  # it checks the reference run
            plain = session.train(session.job(), "plain-broken")
        section = Section("right")
        check(section, session, plain)
    assert section.failures, [check.to_row() for check in section.checks]


def test_a_tensor_on_another_device_is_named() -> None:
    model = nn.BatchNorm1d(3)
    model.running_mean = torch.zeros(3, device="meta")
    observer = SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    model.weight.grad = torch.ones(3)
    observer.optimizer.step()
    observer.optimizer.state[model.weight]["exp_avg"] = torch.zeros(3, device="meta")
    assert correctness._left_behind(observer, torch.device("cpu")) == "optimizer exp_avg, running_mean"


def test_never_waits_fails_if_a_step_reads_the_loss(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    step = vision.Classifier.training_step

    def looks(self: Any, batch: Any) -> Any:
        answer = step(self, batch)
        answer["loss"][0].item()
        return answer

    monkeypatch.setattr(synchronization, "STRATEGIES", {"ddp": synchronization.STRATEGIES["ddp"]})
    monkeypatch.setattr(vision.Classifier, "training_step", looks)
    assert synchronization.run(session).failures == ["ddp: reads a step"]


def test_fits_fails_if_the_prediction_omits_a_part(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    one = memory.networks(True)[0]
    monkeypatch.setattr(memory, "networks", lambda tiny: [(one[0], one[1], (16,))])
    predict = nodes.make_node_plan

    def forgetful(job: Any, **how: Any) -> Any:
        needs = predict(job, **how).forecast
        return SimpleNamespace(forecast=SimpleNamespace(needs=needs.needs - needs.memory["optimizer"]))

    monkeypatch.setattr(nodes, "make_node_plan", forgetful)
    assert memory.run(session).failures == ["perceptron, float32, batch 16", "perceptron, bfloat16, batch 16"]


def test_fast_fails_if_a_step_is_slow(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = DataParallel.apply

    def slow(self: Any, *how: Any) -> None:
        time.sleep(1)
        apply(self, *how)

    monkeypatch.setattr(DataParallel, "apply", slow)
    section = Section("fast")
    speed._compare(section, session, speed.networks(True)[0])
    assert section.failures == ["GPT, launch is faster by"]


def test_fast_fails_if_a_checkpoint_blocks(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpointer.save

    def slow(self: Any, *how: Any) -> None:
        time.sleep(3)
        save(self, *how)

    monkeypatch.setattr(Checkpointer, "save", slow)
    section = Section("fast")
    speed._checkpoint(section, session)
    assert len(section.failures) == 1


# ---- counting synchronizations --------------------------------------------------------------------------------------


def event(name: str, start: float, end: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start if end is None else end))


def test_waits_are_counted_between_the_marks_only() -> None:
    waits = "cudaStreamSynchronize"
    events = [
        event("cudaDeviceSynchronize", 1),  # a synchronization of the profiler, at its start
        event(synchronization.BEGIN, 2, 3),
        *(event(waits, at) for at in (4, 5)),
        event("cudaEventSynchronize", 6),
        event("cudaMemcpyAsync", 6),
        event("aten::_local_scalar_dense", 7),
        event(synchronization.END, 8, 9),
        event(waits, 10),
    ]
    counts = synchronization.count(events)
    assert counts == {waits: 2, "cudaEventSynchronize": 1, "aten::_local_scalar_dense": 1}
    assert sum(counts[name] for name in synchronization.WAITS) == 3


def test_every_item_call_is_seen_by_the_profiler() -> None:
    values = torch.arange(5.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        values[0].item()
        with record_function(synchronization.BEGIN):
            pass
        for value in values:
            value.item()
        bool(values.isfinite().all())
        with record_function(synchronization.END):
            pass
        values[1].item()
    assert synchronization.count(profiler.events()) == {"aten::_local_scalar_dense": 6}


def test_missing_marks_are_not_counted_as_zero() -> None:
    with pytest.raises(Failed, match="marks"):
        synchronization.count([event("cudaStreamSynchronize", 1)])
