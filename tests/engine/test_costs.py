"""What `launch plan` says of a strategy's memory and messages."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.engine.strategies import costs
from launcher.schema import StrategyConfig, TrainerConfig

WHOLE = {"parameters": 400, "gradients": 400, "optimizer": 800}


@pytest.mark.parametrize(
    ("strategy", "kept", "travels", "words"),
    [
        ({}, 1600, 400, "400 B of gradients a step"),
        ({"compression": "bf16"}, 1600, 200, "200 B of gradients a step"),
        ({"compression": "powersgd"}, 2000, 400, "matrices of rank 4"),
        ({"name": "fsdp"}, 400, 2400, "2.3 KiB of weights and gradients a step (2 microbatches)"),
        ({"name": "local_sgd"}, 2000, 50, "400 B of differences every 8 steps"),
        (
            {"name": "diloco", "inner_steps": 100, "compression": "fp16"},
            2400,
            2,
            "200 B of differences every 100 steps",
        ),
    ],
)
def test_bytes(strategy: dict[str, Any], kept: int, travels: int, words: str) -> None:
    config = StrategyConfig(**strategy)
    assert sum(costs.memory(config, 4, WHOLE).values()) == kept
    found, text = costs.traffic(config, TrainerConfig(), 400, 400, 2)
    assert found == travels
    assert words in text
