"""PyTorch's compiler is not imported by a run that does not compile, and is there for one that does."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import sys, torch
from launcher.engine.quick import compiler_loaded, without_compiler
without_compiler()
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(3, 2)).sum().backward()
optimizer.step(); optimizer.zero_grad()
torch.optim.lr_scheduler.StepLR(optimizer, 1)
assert not compiler_loaded() and "sympy" not in sys.modules
"""


@pytest.mark.parametrize(
    "then",
    [
        # a graph of the whole network, with the real compiler
        "assert torch.compile(layer, backend='eager')(torch.ones(3, 2)).shape == (3, 2)",
        "import torch._dynamo.config; torch._dynamo.config.cache_size_limit",
        "torch._dynamo.utils.counters",
        "@torch.compiler.disable\ndef f(): return 1\nassert f() == 1",
        "from torch._dynamo import reset; reset()",
    ],
)
def test_the_stand_in_becomes_the_real_compiler_when_it_is_used(then: str) -> None:
    """Would be wrong: `torch.compile` in the user's code meets a stand-in, or optimizers are compiled into it."""
    after = """
assert compiler_loaded(), sys.modules["torch._dynamo"]
optimizer.zero_grad()
assert hasattr(torch.optim.Optimizer.zero_grad.__wrapped__.__dynamo_disable, "_torchdynamo_disable")
"""
    subprocess.run([sys.executable, "-c", BEGIN + then + after], check=True, timeout=60)


def test_ddp_and_a_process_group_need_no_compiler() -> None:
    code = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.nn.parallel import DistributedDataParallel
DistributedDataParallel(layer)(torch.ones(3, 2)).sum().backward()
dist.destroy_process_group()
assert not compiler_loaded()
"""
    subprocess.run([sys.executable, "-c", BEGIN + code], check=True, timeout=60)
