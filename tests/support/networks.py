"""What is asked of every ready-made network and data set alike."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.config import Job
from tests.support.engine_ranks import column, succeed


def check_configuration(file: Path) -> None:
    """Assert that a file of `conf/` has every parameter of its class, with the class's default."""
    section = yaml.safe_load(file.read_text())
    module, _, name = section.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = {key: "???" if p.default is p.empty else p.default for key, p in parameters.items()}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    # What follows from another section is written as such.
    follows = {key: value for key, value in section.items() if key in settings and str(value).startswith("${")}
    assert section == settings | follows


def check_two_workers_equal_one(job: Job, directory: Path, tags: Sequence[str]) -> None:
    """Assert that two workers log what one does: the same bits where the job is deterministic."""
    found = {}
    for workers in (1, 2):
        succeed(job, directory / str(workers), workers)
        found[workers] = [column(directory / str(workers), tag) for tag in tags]
    for one, two in zip(found[1], found[2], strict=True):
        assert two == (one if job.trainer.deterministic else pytest.approx(one, rel=1e-5))


def losses_while_training(network: Any, batch: Any, steps: int) -> list[float]:
    """Take some steps on one batch and return the mean loss before each."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        total, count = network.training_step(batch)["loss"]
        losses.append((total / count).item())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return losses
