"""The memory, messages and step times of strategies that `launch plan` prints."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.schema import StrategyConfig, TrainerConfig
from launcher.engine.cost import OVERLAP, Link, Step, predict, predict_rare, predict_sharded
from launcher.engine.strategies.kinds.base import Network, kind_of

LINK = Link(latency=1e-4, bandwidth=125e6)
WHOLE = {"parameters": 400, "gradients": 400, "optimizer": 800}


@pytest.mark.parametrize(
    ("strategy", "memory", "sent", "text"),
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
def test_bytes(strategy: dict[str, Any], memory: int, sent: int, text: str) -> None:
    config = StrategyConfig(**strategy)
    assert sum(kind_of(config).memory(config, 4, WHOLE).values()) == memory
    found, description = kind_of(config).traffic(config, TrainerConfig(), 400, 400, 2)
    assert found == sent
    assert text in description


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({}, predict(2.0, 8e6, 4, LINK, overlap=OVERLAP / 2)),
        ({"compression": "fp16"}, predict(2.0, 4e6, 4, LINK, overlap=OVERLAP / 2)),
        ({"compression": "powersgd"}, predict(2.0, 1e5, 4, LINK, overlap=0.0)),
        ({"name": "fsdp"}, predict_sharded(2.0, 8e6, 16e6, 4, LINK, messages=14)),
        ({"name": "fsdp", "compression": "bf16"}, predict_sharded(2.0, 8e6, 8e6, 4, LINK, messages=14)),
        ({"name": "local_sgd"}, predict_rare(2.0, 8e6, 4, LINK, 8)),
        ({"name": "diloco", "inner_steps": 50, "compression": "bf16"}, predict_rare(2.0, 4e6, 4, LINK, 50)),
    ],
)
def test_steps(strategy: dict[str, Any], expected: Step) -> None:
    """Two microbatches in bfloat16: FSDP gathers and reduces with each, the others reduce only with the last one."""
    network = Network(8e6, 8e6, powersgd=1e5, blocks=6, passes=2)
    config = StrategyConfig(**strategy)
    assert kind_of(config).step(config, "bfloat16", network, 2.0, 4, LINK) == expected
