"""A user's project needs no change to this repository: its files, its modules, and names that launch uses as well."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.command import Place

FILES = {
    # Packages with the names of ours. The user's files win one by one, and our other files stay importable.
    "models/__init__.py": "",
    "models/parts.py": "from torch import nn\n\n\ndef layer(width):\n    return nn.Linear(4, width)\n",
    "models/flowers.py": """\
import torch
import torch.nn.functional as F
from models.parts import layer
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.out = layer(width)

    def training_step(self, batch):
        x, y = batch
        scores = self.out(x)
        return {"loss": F.cross_entropy(scores, y, reduction="none"), "accuracy": (scores.argmax(1) == y).float()}


class Flowers:
    def __init__(self, count: int = 60):
        x = torch.linspace(-2, 2, count * 4).reshape(count, 4)
        y = (x.sum(1) * 2).long() % 3
        self.train = torch.utils.data.TensorDataset(x, y)
        self.val = {"near": self.train, "far": torch.utils.data.TensorDataset(x[:7] * 3, y[:7])}
""",
    "conf/__init__.py": "raise ImportError('the user keeps settings of their own here')\n",
    # The user's configuration.
    "settings/model/flowers.yaml": "_target_: models.flowers.Net\n",
    "settings/data/flowers.yaml": "_target_: models.flowers.Flowers\n",
    "settings/experiment/flowers.yaml": """\
# @package _global_
defaults:
  - override /model: flowers
  - override /data: flowers
trainer: {epochs: 2, global_batch_size: 10}
checkpoint: {monitor: val/near/loss}
""",
    # A file with the name of one of ours: the user's wins.
    "settings/experiment/mnist_tiny.yaml": "# @package _global_\nvars: {whose: mine}\n",
    # Settings of this machine.
    "settings/local/default.yaml": """\
# @package _global_
run: {root: "${vars.root}"}
vars: {root: runs of this machine}
""",
}


@pytest.fixture
def project(place: Place) -> Place:
    shutil.rmtree(place.directory)
    for name, text in FILES.items():
        file = place.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return place


def test_an_own_project(project: Place, tmp_path: Path) -> None:
    root = project.directory / "runs of this machine"
    done = project.launch("--config-dir", "settings", "experiment=flowers", "run.name=a", "cluster=none")
    assert done.status == 0, done.err
    assert done.out == f"{root / 'a'}\n"
    assert "val/near/loss" in done.err
    assert "val/far/accuracy" in done.err
    assert {entry.name for entry in project.directory.iterdir()} == {"models", "conf", "settings", root.name}
    assert not os.listdir(project.home)
    assert list(tmp_path.rglob("planted")) == []


def test_the_environment_names_the_configuration_directory(project: Place) -> None:
    shown = project.launch("--cfg", "job", "experiment=mnist_tiny", LAUNCH_CONFIG_DIR="settings")
    assert "whose: mine" in shown.out, "the file called like one of ours is the user's"
    listed = project.launch("runs", "--json", LAUNCH_CONFIG_DIR="settings")
    assert (listed.status, listed.out) == (0, "[]\n")
    plan = project.launch("plan", "model=mlp", "data=mnist", "experiment=mnist_tiny", LAUNCH_CONFIG_DIR="settings")
    assert plan.status == 0, plan.err
    assert "parameters" in plan.out, "our models are still there"


def test_an_own_project_on_ray(project: Place) -> None:
    """Workers import the user's modules, under the same names as the driver."""
    done = project.launch(
        "--config-dir", "settings", "experiment=flowers", "run.name=a", "scaling.workers=2", seconds=120
    )
    assert done.status == 0, done.err
    assert "2 CPU workers" in done.err
    assert done.last == str(project.directory / "runs of this machine" / "a")
    assert not os.listdir(project.home)
    again = project.launch("evaluate", "a", "run.root='runs of this machine'", "cluster=none")
    assert again.status == 0, again.err
    assert '"val/far/loss"' in again.out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("settings/model/flowers.yaml", "_target_: models.flowers.Nett\n", r'no "Nett".*"Net"'),
        ("settings/data/flowers.yaml", "_target_: models.flowers.Flowers\ncuont: 3\n", r'data.cuont.*"count"'),
        ("models/parts.py", "import nowhere_to_be_found\n", r"nowhere_to_be_found.*not installed"),
        ("models/flowers.py", "1 / 0\n", r"ZeroDivisionError.*flowers.py, line 1"),
    ],
)
def test_errors_in_an_own_project(project: Place, file: str, text: str, message: str) -> None:
    """Each case runs in its own process, because a module is imported once."""
    (project.directory / file).write_text(text)
    refused = project.launch("--config-dir", "settings", "experiment=flowers", "cluster=none")
    assert refused.status == 2, refused.err
    assert refused.err.startswith("launch: ")
    assert len(refused.err.splitlines()) == 1
    assert re.search(message, refused.err), refused.err
