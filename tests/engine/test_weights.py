"""Weights of other programs: how names are matched and reported, and which are rejected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.engine.checkpoint import load_weights
from launcher.engine.estimate import estimate
from launcher.engine.weights import check_weights, load_weights_into
from launcher.errors import CheckpointError
from tests.support import engine_toys as toys
from tests.support.engine_ranks import make_job


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def weights_of(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in model.state_dict().items()
    }


class Wrapping(nn.Module):
    """Contains the network as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net()


RENAMED = [
    (lambda name: name, ""),
    (lambda name: f"module.{name}", '"module."'),
    (lambda name: f"_orig_mod.{name}", '"_orig_mod."'),
    (lambda name: f"module._orig_mod.{name}", '"_orig_mod." and "module."'),
    (lambda name: name.replace(".", "._orig_mod.", 1), '"_orig_mod."'),  # every block compiled
    (lambda name: f"model.{name}", '"model."'),
    (lambda name: f"module.model.net.{name}", '"module.model.net."'),
]


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model", "state_dict.model"])
@pytest.mark.parametrize(("rename", "words"), RENAMED)
def test_usual_prefixes_and_keys_are_removed_and_named(
    rename: Any, words: str, wrap: str | None, tmp_path: Path
) -> None:
    expected = weights_of(net())
    content: Any = {rename(name): value for name, value in expected.items()}
    for key in reversed((wrap or "").split(".")):
        content = {key: content, "epoch": 3} if key else content
    torch.save(content, tmp_path / "w.pt")
    model = net()
    check_weights(model, load_weights(tmp_path / "w.pt", shapes_only=True), "w.pt")
    note = load_weights_into(model, load_weights(tmp_path / "w.pt"), "w.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert words in note
    assert (f'"{wrap}"' in note) if wrap else (note.count('"') == words.count('"'))
    assert bool(note) == bool(words or wrap)


def test_weights_of_a_submodule_get_its_prefix() -> None:
    model, expected = Wrapping(), weights_of(net())
    note = load_weights_into(model, expected, "x")
    assert '"backbone."' in note
    assert torch.equal(model.backbone.state_dict()["0.weight"], expected["0.weight"])


@pytest.mark.parametrize("dropped", ["head.weight", "embedding.weight"])
def test_tied_weights_count_as_present(dropped: str) -> None:
    weights = weights_of(Tied())
    del weights[dropped]
    model = Tied()
    assert load_weights_into(model, weights, "x") == ""
    (value,) = weights.values()
    assert torch.equal(model.head.weight, value)
    assert model.head.weight is model.embedding.weight
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    assert "module." in load_weights_into(Tied(), prefixed, "x")


def test_safetensors_of_tied_weights(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved, model = Tied(), Tied()
    safetensors.save_model(saved, str(tmp_path / "w.safetensors"))
    shapes = load_weights(tmp_path / "w.safetensors", shapes_only=True)
    assert len(shapes) == 1
    assert all(value.is_meta for value in shapes.values())
    check_weights(model, shapes, "x")
    load_weights_into(model, load_weights(tmp_path / "w.safetensors"), "x")
    assert torch.equal(model.head.weight, saved.head.weight)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_without_any_match_are_always_rejected(strict: bool) -> None:
    with pytest.raises(CheckpointError, match=r": .*0\.bias.*; .*head\.weight") as caught:
        load_weights_into(net(), weights_of(Tied()), "x", strict)
    assert "load_strict" not in str(caught.value), "it does not help"


def test_what_does_not_fit_is_listed_with_the_prefix_that_fits_best() -> None:
    weights = {f"model.{name}": value for name, value in weights_of(net()).items()}
    weights["loss.weight"] = torch.zeros(1)
    del weights["model.0.bias"]
    with pytest.raises(CheckpointError, match=r": 0\.bias; .*: loss\.weight.*\"model\.\"") as caught:
        load_weights_into(net(), weights, "x")
    assert "checkpoint.load_strict=false" in str(caught.value)
    model = net()
    note = load_weights_into(model, weights, "x", strict=False)
    assert '"model."' in note
    assert re.search(r"\b1 \w+, 1 \w+", note)
    assert torch.equal(model.state_dict()["2.weight"], weights["model.2.weight"])


def test_another_shape_is_refused_and_named() -> None:
    weights = {**weights_of(net()), "2.weight": torch.zeros(9, 3)}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"2\.weight \(9, 3\) .*\(2, 3\)") as caught:
            load_weights_into(net(), weights, "x", strict)
        assert "load_strict" not in str(caught.value)


def test_two_submodules_that_match_equally_are_ambiguous() -> None:
    weights = {f"{part}.{name}": value for part in ("a", "b") for name, value in weights_of(net()).items()}
    with pytest.raises(CheckpointError):
        load_weights_into(net(), weights, "x")
    with pytest.raises(CheckpointError, match='"a."' + r".*" + '"b."'):
        load_weights_into(net(), weights, "x", strict=False)


def test_a_state_dict_under_another_key_is_named(tmp_path: Path) -> None:
    torch.save({"generator": weights_of(net()), "epoch": 1}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt .*state_dict.*\bgenerator\b"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("lenient", [False, True])
def test_the_start_check_refuses_what_does_not_fit(lenient: bool, tmp_path: Path) -> None:
    fits, other = tmp_path / "fits.pt", tmp_path / "other.pt"
    torch.save({f"module.{name}": value for name, value in toys.Net().state_dict().items()}, fits)
    torch.save(Tied().state_dict(), other)
    job = make_job(checkpoint={"load_strict": not lenient})
    estimate(job, weights=str(fits))
    with pytest.raises(CheckpointError) as caught:
        estimate(job, weights=str(other))
    assert caught.value.exit_status == 2
