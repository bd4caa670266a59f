"""A strategy is one file: launch accesses it only through its registered kind."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import config
from launcher.config import Job, StrategyConfig, check_values
from launcher.engine.registry import Registry
from launcher.engine.runtime import Runtime
from launcher.engine.strategies import kinds as folder
from launcher.engine.strategies.ddp import DataParallel
from launcher.engine.strategies.kinds import base
from launcher.engine.strategies.kinds.base import Network, StrategyKind, check_strategy, identity, kind_of, kinds
from launcher.errors import ConfigError, TrainingError, TrustError
from tests.support.engine_ranks import logged, make_job, result_of, succeed

ROOT = Path(__file__).resolve().parents[2]
TOY = {"_target_": "tests.engine.toy_strategy.Net"}


def toy_job(**more: Any) -> Job:
    job = make_job(model=TOY, strategy={"name": "toy"}, epochs=2, **more)
    job.trust.append("tests.engine.toy_strategy")
    return job


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the toy strategy for one test only."""
    monkeypatch.setattr(base._KINDS, "_objects", dict(base._KINDS.all()))
    from tests.engine.toy_strategy import Toy

    base.register(Toy)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_strategy_of_another_package_trains_like_data_parallel(workers: int, tmp_path: Path) -> None:
    succeed(toy_job(), tmp_path / "toy", workers)
    succeed(make_job(epochs=2), tmp_path / "ddp", workers)
    losses = [[values["train/loss"] for values in logged(tmp_path / name).values()] for name in ("toy", "ddp")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result_of(tmp_path / "toy")["status"] == "completed"


def test_its_checks_and_costs_are_used(registered: None) -> None:
    job = toy_job()
    check_values(job)
    with pytest.raises(ConfigError, match="toy "):
        check_values(replace(job, strategy=replace(job.strategy, compression="bf16")))
    with pytest.raises(ConfigError, match=r"strategy\.inner_steps .*strategy=local_sgd .*diloco\b.*\btoy\b"):
        check_values(replace(job, strategy=replace(job.strategy, inner_steps=3)))
    assert kinds()[-1].name == "toy"
    assert kind_of(job.strategy).traffic(job.strategy, job.trainer, 400, 400, 1)[0] == 400
    assert identity(job.strategy) != identity(StrategyConfig())


def test_an_unregistered_strategy_needs_an_entry_point_and_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from launcher.engine import registry

    job = replace(make_job(), strategy=StrategyConfig("other"))
    with pytest.raises(ConfigError, match=r"strategy\.name .*'other'"):
        check_strategy(job)
    point = EntryPoint("other", "tests.engine.toy_strategy:Toy", "launch.strategies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(base._KINDS, "_objects", dict(base._KINDS.all()))
    job.trust[:] = []
    with pytest.raises(TrustError):
        check_strategy(job)
    job.trust[:] = ["tests"]
    check_strategy(job)


def test_a_strategy_that_cannot_follow_changes_raises() -> None:
    class Rigid(DataParallel):
        def rewrap(self, batch: Any) -> None:
            super(DataParallel, self).rewrap(batch)

    model: Any = torch.nn.Linear(1, 1)
    model.training_step = lambda batch: {}
    strategy = Rigid(model, Runtime.single("cpu"), config.TrainerConfig())
    with pytest.raises(TrainingError):
        strategy.rewrap(None)


def test_ddp_fsdp_and_auto_can_resume_each_other() -> None:
    """Guards against a run that cannot be resumed because its strategy was changed."""
    alike = {str(identity(StrategyConfig(name))) for name in ("ddp", "fsdp", "auto")}
    others = {str(identity(StrategyConfig(name))) for name in ("local_sgd", "diloco")}
    assert len(alike) == 1
    assert len(alike | others) == 3
    assert identity(StrategyConfig(bucket_mb=1.0)) == identity(StrategyConfig())
    assert identity(StrategyConfig("diloco", inner_steps=5)) != identity(StrategyConfig("diloco"))


def test_no_other_file_names_a_strategy() -> None:
    """Guards against a new strategy that needs changes in other files. Only the schema names the default."""
    names = {kind.name for kind in kinds() if kind.name not in ("auto", "toy")}
    assert names == {"ddp", "fsdp", "local_sgd", "diloco"}
    found = []
    for path in (ROOT / "launcher").rglob("*.py"):
        if path.is_relative_to(Path(folder.__file__).parent):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{path.relative_to(ROOT)}: {node.value}")
    assert found == ["launcher/config/schema.py: ddp"]


def test_every_kind_predicts_its_costs_and_is_listed_once() -> None:
    names = [kind.name for kind in kinds() if kind.name != "toy"]
    assert names == ["ddp", "fsdp", "local_sgd", "diloco", "auto"]
    whole = {"parameters": 400, "gradients": 400, "optimizer": 800}
    for kind in kinds():
        chosen = StrategyConfig(kind.name)
        assert isinstance(kind, StrategyKind)
        assert 0 < sum(kind.memory(chosen, 4, whole).values()) <= 2400
        step = kind.step(chosen, "float32", Network(400, 400), 1.0, 4, base.Link(1e-4, 1e6))
        assert step.seconds >= 1.0
    assert isinstance(base._KINDS, Registry)
