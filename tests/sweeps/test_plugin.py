"""`hydra/sweeper=launch`: Hydra finds the plugin, instantiates it from a checked configuration, and runs the sweep."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_fixtures import HERE, PROJECT, Sweep, table

from launcher import cli

APP = """
import hydra
import launcher
from hydra.core.config_store import ConfigStore
from launcher.config import Job

ConfigStore.instance().store(name="launch_schema", node=Job)


@hydra.main(config_path="own", config_name="config", version_base="1.3")
def main(config):
    raise SystemExit("a trial lives in workers: this function is not for it")


main()
"""

CONFIG = """
defaults:
  - launch_schema
  - _self_
  - model: line
  - data: points
  - override hydra/sweeper: launch
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
cluster: {kind: none}
trainer: {global_batch_size: 40}
logging: {graph: false}
hydra:
  sweeper:
    params:
      optimizer.lr: 0.1,0.2
"""


def test_it_is_the_sweeper_of_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--cfg", "hydra", "--package", "hydra.sweeper"]) == 0
    assert "_target_: hydra_plugins.launch_sweeper.LaunchSweeper" in capsys.readouterr().out
    assert cli.run(["--info", "plugins"]) == 0
    assert capsys.readouterr().out.count("\t\tLaunchSweeper\n") == 1


def test_hydra_makes_the_sweeper_that_runs(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would be wrong: `-m` works without the plugin, and no other test fails."""
    from hydra.core.plugins import Plugins

    made = []
    make = Plugins.instantiate_sweeper

    def watch(self: Plugins, **arguments: object) -> object:
        made.append(make(self, **arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(Plugins, "instantiate_sweeper", watch)
    assert len(sweep("optimizer.lr=0.1,0.2", "trainer.epochs=1")["trials"]) == 2
    assert [type(sweeper).__module__ for sweeper in made] == ["hydra_plugins.launch_sweeper"]


def test_naming_the_sweeper_changes_nothing_and_another_is_rejected(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "-m", "--config-dir", str(PROJECT), *words, "optimizer.lr=0.1,0.2"]
    assert cli.run([*asked, "hydra/sweeper=launch"]) == 0
    assert "2 trials" in capfd.readouterr().out
    assert cli.run([*asked, "hydra/sweeper=basic"]) == 2
    assert "sweep=grid" in capfd.readouterr().err


@pytest.mark.parametrize("target", ["hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "os.system"])
def test_a_file_cannot_replace_the_sweeper(
    target: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    with (project / "experiment" / "line.yaml").open("a") as file:
        file.write(f"\nhydra:\n  sweeper:\n    _target_: {target}\n")
    assert cli.run(["-m", "--config-dir", str(project), *words, "optimizer.lr=0.1,0.2"]) == 2
    assert "hydra.sweeper._target_" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_a_program_under_hydra_main_sweeps_with_it(tmp_path: Path) -> None:
    """Hydra's `multirun` finds the plugin, and passes it the words and `hydra.sweeper.params`."""
    shutil.copytree(PROJECT, tmp_path / "own")
    shutil.copy(HERE / "sweep_toys.py", tmp_path)
    (tmp_path / "own" / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    root = str(HERE.parent.parent)
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "trainer.epochs=1,2", "run.name=s"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "runs" / "s")
    assert [(row["optimizer.lr"], row["trainer.epochs"]) for row in rows] == [
        ("0.1", "1"),
        ("0.1", "2"),
        ("0.2", "1"),
        ("0.2", "2"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "app.py",
        "own",
        "runs",
        "sweep_toys.py",
    ]
