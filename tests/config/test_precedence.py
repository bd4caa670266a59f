"""Options in other sections, paths with special characters, and which of two settings takes precedence."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import pytest

from launcher.config import CONF, compose, default_run_name
from launcher.errors import ConfigError

NAMES = ["my code", "é", "100%", "a%20b", "#1", "a'b"]


def write(directory: Path, text: str, name: str = "experiment/a.yaml") -> Path:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"# @package _global_\n{text}\n")
    return directory


def test_an_option_in_another_section(tmp_path: Path) -> None:
    own = write(tmp_path, "defaults: [mnist_tiny, /optimizer@vars.other: sgd]")
    for words in (["+optimizer@vars.other=sgd"], ["experiment=a"], ["experiment=a", "optimizer@vars.other=adam"]):
        job = compose(words, own).job
        assert job.optimizer["_target_"] == "torch.optim.AdamW"
        assert job.vars["other"]["_target_"] == f"torch.optim.{'Adam' if len(words) > 1 else 'SGD'}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_with_special_characters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directories: that of launch itself, and that of the user."""
    ours = tmp_path / name / "ours"
    shutil.copytree(CONF, ours)
    for module in ("search_path", "guarded_hydra", "replacing"):
        monkeypatch.setattr(f"launcher.config.{module}.CONF", ours)
    own = write(tmp_path / name / "conf", "defaults: [mnist_tiny]\ntrainer: {epochs: 7}\noptimizer: {lr: 0.5}")
    job = compose(["experiment=a", "optimizer=sgd"], own).job
    assert (job.trainer.epochs, job.optimizer["lr"], job.optimizer["_target_"]) == (7, 0.5, "torch.optim.SGD")


def test_the_typed_cluster_takes_precedence(tmp_path: Path) -> None:
    own = write(tmp_path, "defaults: [mnist_tiny]\ncluster: {kind: none}")
    write(tmp_path, "kind: local\nkeep_minutes: 5", "cluster/ours.yaml")
    (tmp_path / "cluster/ours.yaml").write_text("kind: local\nkeep_minutes: 5\n")
    assert compose(["experiment=a"], own).job.cluster.kind == "none"
    assert compose(["experiment=a", "cluster=local"], own).job.cluster.kind == "local"
    assert compose(["cluster=ours", "experiment=a"], own).job.cluster.kind == "local"
    assert compose(["cluster=local", "experiment=a", "cluster.kind=none"], own).job.cluster.kind == "none"


def test_the_name_of_a_run_contains_all_experiments(tmp_path: Path) -> None:
    own = write(write(tmp_path, "trainer: {epochs: 2}"), "trainer: {seed: 3}", "experiment/b.yaml")
    composed = compose(["experiment=[a,b]", "model=mlp"], own)
    assert (composed.job.trainer.epochs, composed.job.trainer.seed) == (2, 3)
    assert default_run_name(composed.choices, datetime(2026, 1, 2)) == "a-b-20260102-000000"
    primary = (CONF / "config.yaml").read_text().replace("experiment: mnist", "experiment: [a, b]")
    (tmp_path / "config.yaml").write_text(primary)
    assert default_run_name(compose([], own).choices, datetime(2026, 1, 2)) == "a-b-20260102-000000"
    assert default_run_name(compose(["experiment=b"], own).choices, datetime(2026, 1, 2)) == "b-20260102-000000"


def test_a_missing_option_in_another_section() -> None:
    with pytest.raises(ConfigError, match='"sgdd"') as refused:
        compose(["+optimizer@vars.other=sgdd"])
    assert refused.value.key == "optimizer"
