"""models/vision.py: the networks, called like in a training loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import vision
from models.vision import MLP, Classifier, ConvNet, ResNet18
from models.vision_data import Mnist
from tests.support.networks import check_configuration

CONF = Path(vision.__file__).parents[1] / "conf"
FILES = [
    *(CONF / "model" / f"{name}.yaml" for name in ("convnet", "mlp", "resnet18")),
    *(CONF / "data" / f"{name}.yaml" for name in ("mnist", "idx", "folder")),
]


NETWORKS: list[Callable[[], Classifier]] = [
    lambda: ConvNet(classes=4, channels=2, size=13, width=4),
    lambda: MLP(classes=4, channels=2, size=13, width=16),
    lambda: ResNet18(classes=4, channels=2, size=13, width=8, groups=4),
]


@pytest.fixture(params=NETWORKS, ids=["ConvNet", "MLP", "ResNet18"])
def network(request: pytest.FixtureRequest) -> Classifier:
    torch.manual_seed(0)
    return request.param()


def test_training_step_returns_one_value_per_sample(network: Classifier) -> None:
    x, y = torch.randn(5, 2, 13, 13), torch.tensor([0, 1, 2, 3, 0])
    together = network.training_step((x, y))
    for name in ("loss", "accuracy"):
        single = [network.training_step((x[i : i + 1], y[i : i + 1]))[name].item() for i in range(5)]
        assert together[name].tolist() == pytest.approx(single, abs=1e-5), "the value of a sample depends on its batch"


def test_an_empty_share_of_a_batch_has_no_values(network: Classifier) -> None:
    result = network.training_step((torch.empty(0, 2, 13, 13), torch.empty(0, dtype=torch.int64)))
    assert {name: value.shape for name, value in result.items()} == {"loss": (0,), "accuracy": (0,)}
    result["loss"].sum().backward()


def test_training_lowers_the_loss(network: Classifier) -> None:
    x, y = torch.randn(16, 2, 13, 13), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(5):
        loss = network.training_step((x, y))["loss"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_prediction_is_a_plain_dictionary_per_sample(network: Classifier) -> None:
    x = torch.randn(3, 2, 13, 13)
    with torch.no_grad():
        probabilities = network(x).softmax(1)
        found = network.predict_step((x, torch.zeros(3, dtype=torch.int64)))
        assert network.predict_step(x) == found, "labels must not be required"
    assert [one["label"] for one in found] == probabilities.argmax(1).tolist()
    assert [one["probability"] for one in found] == pytest.approx(probabilities.amax(1).tolist())
    assert {type(value) for one in found for value in one.values()} == {int, float}


def test_flops_agree_with_the_count_of_pytorch(network: Classifier) -> None:
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(3, 2, 13, 13)).sum().backward()
    assert network.flops_per_sample * 3 == counter.get_total_flops()


def test_default_sizes() -> None:
    """The figures in conf/model and the two-layer shape of He et al."""
    assert sum(p.numel() for p in ConvNet().parameters()) == 29_322
    resnet = ResNet18()
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in resnet.modules()) == 18 + 3, "3 shortcuts"
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout) for m in resnet.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNet(classes=1), "classes=1"),
        (lambda: ConvNet(channels=0), "channels=0"),
        (lambda: ConvNet(size=6), "size=6: .* 7 "),
        (lambda: ResNet18(width=10, groups=4), "width=10, groups=4"),
        (lambda: ConvNet().training_step((torch.zeros(2, 3, 28, 28), torch.zeros(2))), "1 channel.*28 x 28.*2, 3, 28"),
        (lambda: MLP().predict_step(torch.zeros(2, 1, 28, 20)), r"28 x 28 .*\(2, 1, 28, 20\).*model\.size"),
        (lambda: ResNet18(width=8, groups=4).predict_step(torch.zeros(2, 1, 9, 9)), r" 3 channel.*\(2, 1, 9, 9\)"),
    ],
)
def test_invalid_settings_and_shapes_are_rejected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_convnet_learns_the_digits() -> None:
    """The default network and data reach 75% accuracy in one epoch of a plain loop; chance is 10%."""
    mnist = Mnist()
    torch.manual_seed(0)
    network = ConvNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for indices in torch.randperm(len(mnist.train)).split(100):
        optimizer.zero_grad()
        network.training_step(mnist.train.__getitems__(indices.tolist()))["loss"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        result = network.training_step(mnist.val.__getitems__(range(1000)))
    assert result["accuracy"].mean() > 0.75


def test_models_do_not_import_launch() -> None:
    code = "import sys, models.vision, models.vision_folder; print({'launcher', 'ray', 'hydra'} & {*sys.modules})"
    root = Path(vision.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_configuration_has_the_parameters_and_defaults_of_its_class(file: Path) -> None:
    check_configuration(file)
