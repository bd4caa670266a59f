"""Regional compilation: equal blocks are found, share one graph, and compute the same results."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from launcher.config import TrainerConfig
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.strategies.strategy import repeated_blocks
from launcher.errors import ConfigError
from models.language import GPT


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.single = nn.ModuleList([nn.Linear(2, 2)])
        self.blocks = nn.ModuleList(Nested() for _ in range(2))
        self.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def test_the_outermost_lists_of_equal_blocks_are_found() -> None:
    network = Network()
    assert repeated_blocks(network) == [*network.blocks, *network.others]


def test_a_network_without_repeated_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"compile_blocks=true .*nn\.ModuleList.*\bLinear\b"):
        repeated_blocks(nn.Linear(2, 2))


def test_twelve_blocks_are_compiled_once_and_learn_the_same() -> None:
    # In a new process: the compiler guards global state that other tests have changed.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        plain, blocks, graphs = fresh.submit(_with_and_without_compilation).result()
    assert graphs == 1
    torch.testing.assert_close(blocks, plain)


def _with_and_without_compilation() -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Return the gradients without and with compiled blocks, and the number of graphs."""
    graphs: list[Any] = []

    def only_traced(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def gradients(**trainer: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(context=16, width=16, layers=12, heads=2)
        strategy = DataParallel(model, Runtime.single("cpu"), TrainerConfig(global_batch_size=4, **trainer))
        rows = torch.arange(64).reshape(4, 16)
        strategy.accumulate([(rows, rows + 1)], 4, {"stop": False}, lambda answer: None)
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with mock.patch("torch._inductor.compile_fx.compile_fx", only_traced):
        return plain, gradients(compile=True, compile_blocks=True), len(graphs)


@pytest.mark.slow
def test_compiled_blocks_train_like_eager_blocks(tmp_path: Path) -> None:
    from tests.support.engine_ranks import column, make_job, succeed

    size = {"vocabulary": 256, "context": 32, "width": 16, "layers": 3, "heads": 2, "generate": 1}
    job: dict[str, Any] = {
        "model": {"_target_": "models.language.GPT", **size},
        "data": {"_target_": "models.language_data.KingJames", "context": 32, "val_fraction": 0.001},
        "global_batch_size": 8,
        "steps": 5,
    }
    succeed(make_job(**job), tmp_path / "plain", 2)
    succeed(make_job(**job, compile=True, compile_blocks=True), tmp_path / "blocks", 2, timeout=250)
    losses = [column(tmp_path / name, "train/loss") for name in ("plain", "blocks")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
