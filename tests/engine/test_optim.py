"""Parameter groups: the settings with which each parameter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.engine.optim import build_optimizer, parameter_groups
from launcher.errors import ConfigError
from tests.support.engine_ranks import final_weights, make_job, succeed

ADAM = {"_target_": "torch.optim.AdamW", "lr": 0.1}


def network() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})


def rates(groups: list[dict[str, Any]], **more: Any) -> dict[str, float | None]:
    """Return name -> learning rate of every parameter, None if it is frozen."""
    model = network()
    optimizer = build_optimizer({**ADAM, "groups": groups, **more}, model)
    known = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: known.get(id(p)) for name, p in model.named_parameters()}
    assert all((found[name] is None) != p.requires_grad for name, p in model.named_parameters())
    assert all(group["params"] for group in optimizer.param_groups)
    return found


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], {"stem": (0.1, 0.1), "body": (0.1, 0.1), "head": (0.1, 0.1)}),
        ([{"match": "head.*", "lr": 1.0}], {"stem": (0.1, 0.1), "body": (0.1, 0.1), "head": (1.0, 1.0)}),
        # The first match wins.
        (
            [{"match": "*.bias", "lr": 2.0}, {"match": "head.*", "lr": 1.0}, {"match": "stem*", "freeze": True}],
            {"stem": (None, 2.0), "body": (0.1, 2.0), "head": (1.0, 2.0)},
        ),
        ([{"match": "stem.*", "freeze": True}], {"stem": (None, None), "body": (0.1, 0.1), "head": (0.1, 0.1)}),
        ([{"match": "*", "lr": 3.0}], {"stem": (3.0, 3.0), "body": (3.0, 3.0), "head": (3.0, 3.0)}),
        ([{"match": "head.*", "freeze": False}], {"stem": (0.1, 0.1), "body": (0.1, 0.1), "head": (0.1, 0.1)}),
    ],
)
def test_the_first_pattern_that_matches_decides(groups: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    expected = {
        f"{layer}.{kind}": pair[i] for layer, pair in expected.items() for i, kind in enumerate(("weight", "bias"))
    }
    assert rates(groups) == expected


def test_any_setting_of_the_optimizer_may_differ_by_group() -> None:
    groups = [{"match": "*.bias", "weight_decay": 0.0}]
    optimizer = build_optimizer({**ADAM, "weight_decay": 0.3, "groups": groups}, network())
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(3, 0.3), (3, 0.0)]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            [{"match": "haed.*", "lr": 1.0}],
            r'optimizer\.groups: .*"haed\.\*".*"head',
        ),
        (
            [{"match": "head.*"}, {"match": "head.bias", "lr": 1.0}],
            r'optimizer\.groups: .*"head.bias"',
        ),
        ([{"lr": 1.0}], "`match`"),
        ([{"match": "*", "freeze": True}], r"optimizer\.groups"),
    ],
)
def test_a_rule_that_does_nothing_is_an_error(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parameter_groups(network(), groups)


def test_frozen_parameters_stay_as_they_were_on_all_ranks(tmp_path: Path) -> None:
    frozen = {**ADAM, "weight_decay": 0.5, "groups": [{"match": "stem.*", "freeze": True}]}
    for steps in (1, 6):
        succeed(make_job(optimizer=frozen, steps=steps), tmp_path / str(steps), 2)
    first, last = (final_weights(tmp_path / str(steps)) for steps in (1, 6))
    same = {name for name in first if torch.equal(first[name], last[name])}
    assert same == {"stem.weight", "stem.bias"}


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        ({"_target_": "torch.optim.AdamW", "lr": 0.1}, True),
        ({"_target_": "torch.optim.AdamW", "lr": 0.1, "fused": False}, False),
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, True),
        ({"_target_": "torch.optim.Rprop", "lr": 0.1}, None),
    ],
)
def test_one_fused_kernel_updates_all_parameters(optimizer: Any, fused: bool | None) -> None:
    assert build_optimizer(optimizer, network()).param_groups[0].get("fused") == fused
