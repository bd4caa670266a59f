"""The peak FLOP rates of GPUs, for the tag `throughput/mfu` (model FLOP utilisation).

Model FLOP utilisation (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B) is the FLOP rate of the network, from
its `flops_per_sample`, divided by the peak rate of the devices. Recomputation does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Peak:
    """The dense peak rates of a GPU, TFLOP/s.

    Since Ampere, NVIDIA's data sheets state the rates of Tensor cores with 2:4 sparsity, which are twice as high.

    Args:
        name: beginning of the device name (`torch.cuda.get_device_name`), without "NVIDIA" or "Tesla".
        bfloat16: None if the Tensor cores do not support bfloat16.
        float32: the rate of TF32 if the GPU supports it, which matrix products then use (hardware.py).
        source: the data sheet.
    """

    name: str
    bfloat16: float | None
    float16: float
    float32: float
    source: str


# The longest matching name wins. "H100" is the SXM form, whose device name is "NVIDIA H100 80GB HBM3".
PEAKS = (
    Peak("T4", None, 65.0, 8.1, "NVIDIA T4 data sheet (DS-09377, 2019)"),
    Peak("V100", None, 112.0, 14.0, "NVIDIA V100 data sheet (2020), PCIe"),
    Peak("V100-PCIE", None, 112.0, 14.0, "NVIDIA V100 data sheet (2020), PCIe"),
    Peak("V100-SXM2", None, 125.0, 15.7, "NVIDIA V100 data sheet (2020), SXM2"),
    Peak("V100S", None, 130.0, 16.4, "NVIDIA V100 data sheet (2020), V100S"),
    Peak("A10", 125.0, 125.0, 62.5, "NVIDIA A10 data sheet (2021): half of 250 and 125"),
    Peak("A100", 312.0, 312.0, 156.0, "NVIDIA A100 data sheet (2022); PCIe and SXM alike"),
    Peak("H100", 989.4, 989.4, 494.7, "NVIDIA H100 architecture white paper, SXM5"),
    Peak("H100 PCIE", 756.0, 756.0, 378.0, "NVIDIA H100 architecture white paper, PCIe"),
    Peak("H100 NVL", 835.5, 835.5, 417.5, "NVIDIA H100 data sheet (2024), NVL: half of 1,671 and 835"),
    Peak("H200", 989.5, 989.5, 494.5, "NVIDIA H200 data sheet (2024), SXM: half of 1,979 and 989"),
    Peak("H200 NVL", 835.5, 835.5, 417.5, "NVIDIA H200 data sheet (2024), NVL: half of 1,671 and 835"),
    # "NVIDIA RTX PRO 6000 Blackwell Server Edition" and "… Workstation Edition".
    Peak("RTX PRO 6000", 503.8, 503.8, 251.9, "NVIDIA RTX Blackwell PRO white paper (2025), at 2.62 GHz"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak rate of a device in `trainer.precision`, FLOP/s, or None if it is unknown."""
    name = device_name.upper().replace("NVIDIA", "").replace("TESLA", "").strip()
    fitting = [peak for peak in PEAKS if name.startswith(peak.name) and not name[len(peak.name) :][:1].isalnum()]
    if not fitting:
        return None
    best = max(fitting, key=lambda peak: len(peak.name))
    rate: float | None = getattr(best, precision)
    return None if rate is None else rate * 1e12


def flops_per_sample(model: nn.Module) -> float | None:
    """Return the model's `flops_per_sample`: FLOPs of the forward and backward pass of one sample, or None."""
    flops = getattr(model, "flops_per_sample", None)
    if flops is None:
        return None
    return float(flops() if callable(flops) else flops)


def share_of_a_sample(model: nn.Module, device: torch.device, precision: str) -> float | None:
    """Return the seconds that one sample takes on `device` at its peak rate, or None if that is unknown.

    CPUs have no useful peak rate: it depends on the clock, the instruction set and other load.
    """
    if device.type != "cuda":
        return None
    flops, peak = flops_per_sample(model), peak_flops(torch.cuda.get_device_name(device), precision)
    return None if flops is None or peak is None else flops / peak
