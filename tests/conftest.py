"""What every test gets: a clean environment, a browser when there is one, and a record of the slow tests."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import reworded

if "--reworded" in sys.argv:  # before the first import of launcher; processes of pytest-xdist inherit it
    reworded.install()

from launcher.config import calling_directory
from tests.support import device
from tests.support.command import here, place
from tests.support.stores import container, emulator
from tests.support.vmlab import lab, ssh_lab
from tests.support.vmlab.lab import Lab
from tests.support.vmlab.ssh_lab import SshLab

__all__ = ["container", "emulator", "here", "place"]  # fixtures for every test that runs `launch`, or needs a store

# Set by a launcher around the tests (torchrun, Slurm) or by the developer: each would change what a test measures.
FOREIGN = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"),
    *("LAUNCH_CONFIG_DIR", "RAY_ADDRESS", "HYDRA_FULL_ERROR"),
    "PYTHONDONTWRITEBYTECODE",  # each process of a test would compile the launcher again
    *("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "LAUNCH_AZURE_BLOB_AUTHORITY", "LAUNCH_STORE_PATIENCE"),
]
# The files of tests that take longest in all, in that order: they start Ray, SSH servers or browsers.
_LONGEST = [
    *("test_ssh_runs", "test_ray_jobs", "test_ray_train", "test_faults", "test_docs", "test_interrupts"),
    *("test_ssh_machines", "test_kinds", "test_rendezvous", "test_groups", "test_ray_sweep", "test_existing"),
    *("test_streams", "test_api", "test_shared_storage", "test_benchmarks", "test_planted_secrets", "test_recovery"),
    *("test_ports_of_hosts", "test_driver", "test_browser", "test_board", "test_cli", "test_config", "test_trainer"),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write outcome and duration of every test that ran to this file")
    parser.addoption("--reworded", action="store_true", help="change the words of all messages")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests marked `gpu` compute")


def pytest_configure(config: pytest.Config) -> None:
    device.choose(config.getoption("--device"))


@pytest.hookimpl(trylast=True)  # the tests that -m leaves out are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no process is left with one of them at the end.

    With --device cuda, skip what cannot compute there: every test without a GPU, and those without the marker.
    """
    items.sort(key=lambda item: _LONGEST.index(name) if (name := item.path.stem) in _LONGEST else len(_LONGEST))
    if config.getoption("--reworded"):
        golden = [item for item in items if item.get_closest_marker("golden") is not None]
        config.hook.pytest_deselected(items=golden)
        items[:] = [item for item in items if item not in golden]
    if config.getoption("--device") == "cpu":
        return
    import torch

    missing = not torch.cuda.is_available()
    for item in items:
        if missing:
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no usable GPU here; check it with nvidia-smi"))
        elif item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.skip(reason="the test computes on the CPU; -m gpu leaves it out"))


def pytest_collection_finish() -> None:
    """Exempt what the imports have created from garbage collection: a full collection, which ends each run of a test in
    this process, takes 0.03 s of CPU instead of 0.26 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _user_directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, _user_directories: Path) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    # Never the developer's own record of runs and clusters.
    # `mkdtemp`, since `tmp_path_factory.mktemp` reads the names of all earlier directories, each time.
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, tempfile.mkdtemp(dir=_user_directories))


@pytest.fixture(autouse=True)
def _no_calling_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that composes a configuration in this process trusts its directory; the next test must not."""
    monkeypatch.setattr(calling_directory, "_calling", [])
    monkeypatch.setattr(calling_directory, "_guarded", [])


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of an installed Chromium or Chrome. Without one the test is skipped, but fails where CI is set."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    message = f"no browser found (looked for {', '.join(BROWSERS)}); on Debian: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def machines() -> Iterator[Lab]:
    """Three machines, see tests/support/vmlab. Where they cannot be made, skip the test, or fail it where CI is set."""
    if problem := lab.why_not():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    with lab.Lab(3) as made:
        yield made


@pytest.fixture
def cluster(machines: Lab) -> Lab:
    """The machines, Ray on two of them with a CPU each."""
    machines.restore()
    return machines


@pytest.fixture
def ssh_machines(request: pytest.FixtureRequest) -> Iterator[SshLab]:
    """Two machines with SSH servers and a laptop. `indirect` parameters change the number and the links' rate."""
    if problem := ssh_lab.why_not():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    with SshLab(*getattr(request, "param", (2,))) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    yield
    target: Path | None = config.getoption("--record")
    if target is None:
        return
    rows, passed = [], True
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            # A test that passes is reported for its call, one that fails in a fixture for that.
            if outcome != "passed" or report.when == "call":
                rows.append(f"| `{report.nodeid}` | {outcome} | {report.duration:.0f} s |")
                passed &= outcome == "passed"
    if not rows:
        terminalreporter.write_line(f"{target} is left as it was: no test ran")
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        "# The slow tests, last run\n\n"
        f"Written by `make slow` on {datetime.date.today()}: {'all passed' if passed else 'NOT all passed'}; "
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores.\n\n"
        "| test | outcome | time |\n| --- | --- | --- |\n" + "\n".join(sorted(rows)) + "\n"
    )
    terminalreporter.write_line(f"recorded in {target}")
