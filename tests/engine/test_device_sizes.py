"""The estimated sizes for another device: bytes per sample, bytes per batch, messages, FLOPs."""

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


def sizes_of(model: dict[str, Any], data: Any, strategy: dict[str, Any] | None = None, **trainer: Any) -> DeviceSizes:
    found = estimate(make_job(model=model, data=data, strategy=strategy, **trainer), device_sizes=True)
    assert found.device_sizes is not None
    return found.device_sizes


def test_weights_cast_to_16_bits_are_saved_once_and_activations_per_sample() -> None:
    whole, half = sizes_of(MLP, "Pictures"), sizes_of(MLP, "Pictures", precision="bfloat16")
    assert whole.saved_once < 100  # only a count
    assert half.saved_once == pytest.approx(
        2 * (128 * 128 + 128 * 10), abs=100
    )  # those of the first layer are not needed
    assert whole.saved_per_sample == pytest.approx(4 * (784 + 128 + 128 + 10), abs=100)
    assert half.saved_per_sample == pytest.approx(2 * (784 + 128 + 128), rel=0.05)
    assert whole.largest_per_sample == 4 * 784
    assert half.largest_per_sample <= half.saved_per_sample, (
        "the size of a weight does not depend on the number of samples"
    )


def test_flops_are_those_of_three_forward_passes() -> None:
    assert sizes_of(MLP, "Pictures").flops_per_sample == 3 * 2 * (784 * 128 + 128 * 128 + 128 * 10)


def test_activation_checkpointing_saves_fewer_bytes() -> None:
    plain = sizes_of(GPT, KING_JAMES, precision="bfloat16")
    again = sizes_of(GPT, KING_JAMES, {"activation_checkpointing": True}, precision="bfloat16")
    assert again.saved_per_sample < 0.5 * plain.saved_per_sample
    assert (plain.blocks, again.blocks) == (3, 3)


def test_fsdp_gathers_one_block_and_the_weights_outside_of_blocks() -> None:
    outside, block = 2 * 256 * 64 + 64, 12 * 64 * 64 + 2 * 64
    found = sizes_of(GPT, KING_JAMES, precision="bfloat16").gathered
    assert found == pytest.approx(2 * (outside + block), rel=0.01)


def test_a_layer_that_rejects_one_sample_is_measured_with_two() -> None:
    assert sizes_of({"_target_": "Normed"}, "Points").saved_per_sample > 0


def test_the_start_of_a_run_does_not_measure_device_sizes() -> None:
    assert estimate(make_job()).device_sizes is None


@pytest.mark.parametrize("shape", [(7,), (3, 4), (100, 50), (8, 3, 5, 5), (512, 512)])
def test_powersgd_sends_the_predicted_number_of_bytes(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    factors = PowerSGD([weight], Runtime.single("cpu"), 4, 0, 0).factors
    n, m = shape[0], weight.numel() // shape[0]
    sent = sum(4 * (n + m) * factor.shape[1] for factor in factors.values()) or 4 * weight.numel()
    assert powersgd_bytes([weight], 4) == sent
