"""What is looked at for a device that is not here: bytes with each sample, bytes once, messages, FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.engine.estimate import DeviceSizes, estimate
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.compression import PowerSGD, powersgd_bytes
from tests.support.engine_ranks import make_job

MLP = {"_target_": "models.vision.MLP"}  # 784 -> 128 -> 128 -> 10
GPT = {"_target_": "models.language.GPT", "layers": 3, "width": 64, "context": 32}
KING_JAMES = {"_target_": "models.language_data.KingJames", "context": 32}


def looked(model: dict[str, Any], data: Any, strategy: dict[str, Any] | None = None, **trainer: Any) -> DeviceSizes:
    found = estimate(make_job(model=model, data=data, strategy=strategy, **trainer), device_sizes=True)
    assert found.device_sizes is not None
    return found.device_sizes


def test_weights_in_16_bits_are_kept_once_and_the_rest_with_each_sample() -> None:
    whole, half = looked(MLP, "Pictures"), looked(MLP, "Pictures", precision="bfloat16")
    assert whole.saved_once < 100  # but for a count
    assert half.saved_once == pytest.approx(2 * (128 * 128 + 128 * 10), abs=100)  # the first layer's are not needed
    assert whole.saved_per_sample == pytest.approx(4 * (784 + 128 + 128 + 10), abs=100)
    assert half.saved_per_sample == pytest.approx(2 * (784 + 128 + 128), rel=0.05)
    assert whole.largest_per_sample == 4 * 784
    assert half.largest_per_sample <= half.saved_per_sample, "a weight does not grow with the samples"


def test_what_is_counted_is_three_forward_passes() -> None:
    assert looked(MLP, "Pictures").flops_per_sample == 3 * 2 * (784 * 128 + 128 * 128 + 128 * 10)


def test_blocks_that_compute_again_keep_less() -> None:
    plain = looked(GPT, KING_JAMES, precision="bfloat16")
    again = looked(GPT, KING_JAMES, {"activation_checkpointing": True}, precision="bfloat16")
    assert again.saved_per_sample < 0.5 * plain.saved_per_sample
    assert (plain.blocks, again.blocks) == (3, 3)


def test_fsdp_gathers_what_is_outside_the_blocks_and_one_block() -> None:
    outside, block = 2 * 256 * 64 + 64, 12 * 64 * 64 + 2 * 64
    found = looked(GPT, KING_JAMES, precision="bfloat16").gathered
    assert found == pytest.approx(2 * (outside + block), rel=0.01)


def test_a_layer_that_refuses_one_sample_is_looked_at_with_two() -> None:
    assert looked({"_target_": "Normed"}, "Points").saved_per_sample > 0


def test_a_start_does_not_look_ahead() -> None:
    assert estimate(make_job()).device_sizes is None


@pytest.mark.parametrize("shape", [(7,), (3, 4), (100, 50), (8, 3, 5, 5), (512, 512)])
def test_powersgd_sends_what_is_said(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    factors = PowerSGD([weight], Runtime.single("cpu"), 4, 0, 0).factors
    n, m = shape[0], weight.numel() // shape[0]
    sent = sum(4 * (n + m) * factor.shape[1] for factor in factors.values()) or 4 * weight.numel()
    assert powersgd_bytes([weight], 4) == sent
