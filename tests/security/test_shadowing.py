"""Modules of the calling directory with the names of other modules: they shadow none that launch needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from launcher.config import calling_directory, targets
from launcher.errors import TrustError
from tests.support.command import Place
from tests.support.stores import free_port

ROOT = Path(__file__).resolve().parents[2]
MARK = "open(r'{mark}', 'a').write(__name__ + ' ')\n"
# Names of the standard library (one that only exists on Windows, and that packages try to import), of launch's
# dependencies, and of their dependencies.
SHADOWS = (
    "json",
    "argparse",
    "difflib",
    "msvcrt",
    "hydra",
    "rich",
    "torch",
    "ray",
    "numpy",
    "yaml",
    "six",
    "packaging",
)
FOLDERS = ("tensorboard", "omegaconf", "hydra_plugins", "google")
NETWORK = """
import utils, datasets
import models.mine
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, utils.WIDTH)
    def training_step(self, batch):
        x, y = batch
        return {"loss": (self.layer(x) - y).pow(2).squeeze(-1)}
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def hostile(place: Place, mark: Path) -> Place:
    """A directory with a run, and with files that record when they are executed."""
    text = MARK.format(mark=mark)
    for name in SHADOWS:
        (place.directory / f"{name}.py").write_text(text)
    for name in FOLDERS:
        (place.directory / name).mkdir()
        (place.directory / name / "main.py").write_text(text)
    (place.directory / "tensorboard" / "__init__.py").write_text(text)
    (place.directory / "omegaconf" / "__init__.py").write_text(text)
    (place.directory / "plugin.py").write_text(text)
    metadata = place.directory / "plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nplugin = plugin:main\n")
    run = place.runs / "a"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"status": "completed", "steps": 1}))
    (run / "config.yaml").write_text("{}\n")
    (run / "log.txt").write_text("step 1\n")
    return place


def _marks(mark: Path) -> list[str]:
    return mark.read_text().split() if mark.exists() else []


@pytest.mark.parametrize(
    ("words", "status"),
    [(("runs",), 0), (("logs", "a"), 0), (("stop", "a"), 2), (("evaluate", "a"), 2), (("plan",), 0)],
)
def test_a_verb_executes_no_file_of_the_directory(
    hostile: Place, mark: Path, words: tuple[str, ...], status: int
) -> None:
    done = hostile.launch(*words)
    assert (done.status, _marks(mark)) == (status, []), done.err


def test_python_m_launcher_executes_no_file_of_the_directory(hostile: Place, mark: Path) -> None:
    """`python -m` puts the current directory first, before launch is imported."""
    environment = {**os.environ, "HOME": str(hostile.home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher", "runs"]
    done = subprocess.run(command, cwd=hostile.directory, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, _marks(mark)) == (0, []), done.stderr


def test_an_empty_pythonpath_entry_executes_no_file_of_the_directory(hostile: Place, mark: Path) -> None:
    """`PYTHONPATH=$PYTHONPATH:…` without a value puts the current directory on the path."""
    for name in ("json", "argparse", "difflib"):  # Python itself imports these before launch is
        (hostile.directory / f"{name}.py").unlink()
    done = hostile.launch("runs", PYTHONPATH=os.pathsep)
    assert (done.status, _marks(mark)) == (0, []), done.err


def test_the_board_is_that_of_the_package(hostile: Place, mark: Path) -> None:
    running = hostile.start("board", "--port", str(free_port()))
    try:
        running.wait_for("http://")
        url = re.findall(r"http://\S+", running.shown)[0]

        def answers() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return True
            except OSError:
                return running.process.poll() is not None

        running.wait_until(answers, 60)
        running.signal(signal.SIGINT)
        running.finish(30)
    finally:
        running.close()
    assert _marks(mark) == []


@pytest.mark.parametrize("cluster", ["none", "local"])
def test_training_uses_the_modules_of_both(hostile: Place, mark: Path, tmp_path: Path, cluster: str) -> None:
    """The user's `utils`, `datasets` and `models` come first, also before installed ones, and on Ray's workers."""
    installed = tmp_path / "installed"
    for name in ("utils", "datasets"):
        (installed / name).mkdir(parents=True)
        (installed / name / "__init__.py").write_text("raise SystemExit('an installed package')\n")
    (hostile.directory / "network.py").write_text(NETWORK)
    (hostile.directory / "utils.py").write_text("WIDTH = 1\n")
    (hostile.directory / "datasets.py").touch()
    (hostile.directory / "models").mkdir()
    (hostile.directory / "models" / "mine.py").touch()
    (hostile.directory / "own" / "model" / "net.yaml").write_text("_target_: network.Net\n")
    words = ["--config-dir", "own", "experiment=toy", "model=net", "trainer.steps=1", "run.name=b"]
    words += [f"cluster={cluster}", "scaling.workers=1", "scaling.device=cpu"]
    done = hostile.launch(*words, seconds=200, PYTHONPATH=str(installed))
    assert (done.status, _marks(mark)) == (0, []), done.err


# ---- the finder -----------------------------------------------------------------------------------------------------


def test_a_module_with_a_protected_name_is_rejected_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("code", "optuna"):
        (tmp_path / f"{name}.py").write_text("class Net: ...\n")
    targets.add_calling_directory(tmp_path)
    for name in ("code", "optuna"):
        with pytest.raises(TrustError, match=rf'model\._target_ .*"{name}\.Net".* "{name}" '):
            targets.check({"model": {"_target_": f"{name}.Net"}})


def test_what_is_protected_follows_from_metadata() -> None:
    found = calling_directory.dependency_modules()
    assert {"torch", "ray", "hydra", "omegaconf", "yaml", "rich", "tensorboard", "numpy", "PIL", "markdown_it"} <= found
    assert not found & {"utils", "datasets", "models", "conf", "tests", "pytest", "mypy"}


def test_without_metadata_it_follows_from_the_same_packages() -> None:
    """On nodes of a cluster, launch is not an installed package."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=~! ;]", line)[0] for line in stated}
    assert set(calling_directory.DEPENDENCIES) == names


def test_a_process_that_unpickles_a_data_set_finds_its_module(tmp_path: Path) -> None:
    """A loader process that is not forked does so: `models` of the user and of launch are one package there as well."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text("class Rows(list): ...\n")
    write = (
        "import pickle, sys; from launcher.config.calling_directory import add_calling_directory as add; add('.');"
        "from models.mine import Rows; from models.vision_data import Mnist; from launcher.engine.data import Fetch;"
        "sys.stdout.buffer.write(pickle.dumps((sys.path, Fetch(Rows([1]), None, 0))))"
    )
    read = (
        "import io, pickle, sys; pickled = pickle.Unpickler(sys.stdin.buffer); sys.path[:] = {path!r};"
        "print(pickled.load()[1]._dataset)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-P", "-c"]
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "check": True, "timeout": 120}
    pickled = subprocess.run([*python, write], **options).stdout  # type: ignore[call-overload]
    read = read.format(path=[*sys.path, str(ROOT), str(tmp_path)])
    assert subprocess.run([*python, read], input=pickled, **options).stdout == b"[1]\n"  # type: ignore[call-overload]
