"""Model FLOP utilisation: peaks of devices by their reported names, and the tag."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from launcher.clusters.pricing import catalogue
from launcher.engine import entry, peaks, trainer
from launcher.engine.runtime import Runtime
from launcher.runs import RunDirectory
from tests.support.engine_ranks import Puppet, Script, column, make_job


@pytest.mark.parametrize(
    ("device", "bfloat16", "float16", "float32"),
    [
        ("Tesla T4", None, 65, 8.1),
        ("Tesla V100-PCIE-16GB", None, 112, 14),
        ("Tesla V100-SXM2-32GB", None, 125, 15.7),
        ("Tesla V100S-PCIE-32GB", None, 130, 16.4),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156),
        ("NVIDIA A100-SXM4-40GB", 312, 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 756, 378),
        ("NVIDIA H100 NVL", 835.5, 835.5, 417.5),
        ("NVIDIA H200", 989.5, 989.5, 494.5),
        ("NVIDIA H200 NVL", 835.5, 835.5, 417.5),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8, 503.8, 251.9),
        ("NVIDIA T400 4GB", None, None, None),
        ("NVIDIA A1000", None, None, None),
        ("NVIDIA GeForce RTX 4090", None, None, None),
    ],
)
def test_devices_are_recognized_by_their_reported_names(
    device: str, bfloat16: float | None, float16: float | None, float32: float | None
) -> None:
    for precision, rate in (("bfloat16", bfloat16), ("float16", float16), ("float32", float32)):
        found = peaks.peak_flops(device, precision)
        assert found == (None if rate is None else pytest.approx(rate * 1e12)), precision


def test_every_peak_has_a_source() -> None:
    assert all(peak.source.startswith("NVIDIA") for peak in peaks.PEAKS)


class Costly(nn.Module):
    def flops_per_sample(self) -> int:
        return 5_000_000_000


def test_the_share_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100 80GB PCIe")
    assert peaks.share_of_a_sample(Costly(), gpu, "bfloat16") == pytest.approx(5e9 / 312e12)
    assert peaks.share_of_a_sample(nn.Linear(2, 2), gpu, "bfloat16") is None, "a model that does not report its cost"
    assert peaks.share_of_a_sample(Costly(), torch.device("cpu"), "bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert peaks.share_of_a_sample(Costly(), gpu, "bfloat16") is None


@pytest.mark.parametrize("share", [None, 1e-6])
def test_the_tag_is_there_where_the_peak_is_known(
    share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "share_of_a_sample", lambda *facts: share)
    directory = RunDirectory(tmp_path)
    directory.create()
    task = entry.Task("train", make_job(epochs=1, log_every=5), str(tmp_path), [], time.time())
    entry.run(task, Runtime.single("cpu"), Puppet(Script(), directory, 0))
    rates, found = column(tmp_path, "throughput/samples_per_second"), column(tmp_path, "throughput/mfu")
    assert found == ([] if share is None else pytest.approx([rate * share for rate in rates]))


def test_every_gpu_of_the_catalogue_has_a_peak() -> None:
    """Without a peak `launch plan` cannot predict times."""
    for size in catalogue.sizes().values():
        if size.status != "retired":
            assert peaks.peak_flops(size.gpu, "float16"), size.gpu
    server = peaks.peak_flops("NVIDIA RTX PRO 6000 Blackwell Server Edition", "bfloat16")
    assert peaks.peak_flops("RTX PRO 6000", "bfloat16") == server
