"""A section that names another class drops the keys of the previous class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config import compose
from tests.config.test_config import GLOBAL, write

ADAM, SGD = "torch.optim.Adam", "torch.optim.SGD"
GROUPS: dict[str, Any] = {"groups": []}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([f"optimizer._target_={ADAM}"], {"_target_": ADAM, **GROUPS}),
        # The order of words does not matter, because the user wrote all of them.
        (["optimizer.lr=0.1", f"optimizer._target_={SGD}"], {"_target_": SGD, "lr": 0.1, **GROUPS}),
        ([f"optimizer={{_target_: {SGD}, lr: 0.2}}"], {"_target_": SGD, "lr": 0.2, **GROUPS}),
        (["optimizer=sgd", f"optimizer._target_={ADAM}"], {"_target_": ADAM, **GROUPS}),
        # Deletions that were needed when keys were inherited.
        ([f"optimizer._target_={ADAM}", "~optimizer.betas", "~optimizer.eps"], {"_target_": ADAM, **GROUPS}),
    ],
)
def test_a_word_that_names_another_class_drops_the_keys_of_the_default(words: list[str], expected: Any) -> None:
    assert compose(words).job.optimizer == expected


def test_the_same_class_keeps_its_keys() -> None:
    optimizer = compose(["optimizer._target_=torch.optim.AdamW"]).job.optimizer
    assert optimizer == compose([]).job.optimizer
    assert optimizer["weight_decay"] == 0.05


@pytest.mark.parametrize(
    ("section", "word", "expected"),
    [
        ("model", "model._target_=models.vision.MLP", {"_target_": "models.vision.MLP"}),
        ("data", "data._target_=models.text.Text", {"_target_": "models.text.Text"}),
        (
            "scheduler",
            "scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
            {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR"},
        ),
    ],
)
def test_every_open_section_drops_them(section: str, word: str, expected: dict[str, Any]) -> None:
    assert getattr(compose([word]).job, section) == expected


def test_callbacks_and_nested_sections_drop_them(tmp_path: Path) -> None:
    words = ["callbacks=ema", "callbacks.ema._target_=torch.optim.mine.Average", "trust=[mine]"]
    assert compose(words).job.callbacks == {"ema": {"_target_": "torch.optim.mine.Average"}}
    text = "_target_: mine.Net\nbody: {_target_: mine.Deep, depth: 9}\nhead: {_target_: mine.Head, width: 2}\n"
    own = write(tmp_path, {"model/mine.yaml": text})
    model = compose(
        ["model=mine", "model.body._target_=mine.Wide", "model.body.width=3", "trust=[mine]"], own
    ).job.model
    assert model["body"] == {"_target_": "mine.Wide", "width": 3}
    assert model["head"] == {"_target_": "mine.Head", "width": 2}


def test_a_file_that_names_another_class_drops_them_too(tmp_path: Path) -> None:
    own = write(
        tmp_path,
        {
            "experiment/mine.yaml": f"{GLOBAL}model: {{_target_: mine.Net}}\noptimizer: {{_target_: {SGD}, lr: 0.3}}\n",
            "local/default.yaml": f"{GLOBAL}optimizer: {{lr: 0.9, momentum: 0.5}}\n",
        },
    )
    job = compose(["experiment=mine", "trust=[mine]"], own).job
    assert job.model == {"_target_": "mine.Net"}
    # Keys in a user's file without a class stay; later files and words take precedence.
    assert job.optimizer == {"_target_": SGD, "lr": 0.3, "momentum": 0.5, **GROUPS}
    again = compose(["experiment=mine", "trust=[mine]", f"optimizer._target_={ADAM}"], own).job
    assert again.optimizer["_target_"] == ADAM
    assert "weight_decay" not in again.optimizer


def test_keys_of_an_own_experiment_stay(tmp_path: Path) -> None:
    rules = "[{match: 'stem.*', freeze: true}]"
    own = write(tmp_path, {"experiment/mine.yaml": f"{GLOBAL}optimizer: {{lr: 0.3, groups: {rules}}}\n"})
    optimizer = compose(["experiment=mine", f"optimizer._target_={ADAM}"], own).job.optimizer
    assert optimizer == {"_target_": ADAM, "lr": 0.3, "groups": [{"match": "stem.*", "freeze": True}]}


def test_keys_that_an_overlay_sets_for_any_class_stay() -> None:
    data = compose(["debug=pdb", "data._target_=models.text.Text"]).job.data
    assert data == {"_target_": "models.text.Text", "_if_taken_": {"num_workers": 0}}


def test_a_stored_configuration_is_treated_as_a_default(tmp_path: Path) -> None:
    stored = tmp_path / "config.yaml"
    stored.write_text(compose([f"optimizer._target_={SGD}", "optimizer.momentum=0.5"]).to_yaml())
    assert compose([], stored=stored).job.optimizer == {"_target_": SGD, "momentum": 0.5, **GROUPS}
    assert compose([f"optimizer._target_={ADAM}"], stored=stored).job.optimizer == {"_target_": ADAM, **GROUPS}
    kept = compose([f"optimizer._target_={SGD}", "optimizer.lr=1"], stored=stored).job.optimizer
    assert kept == {"_target_": SGD, "momentum": 0.5, "lr": 1, **GROUPS}
