"""Installation: the wheel, the pinned versions, and the scripts that create the environment."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import lock

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PACKAGES = ("launcher", "conf", "models")


def pins() -> Iterator[Requirement]:
    for line in CONSTRAINTS.splitlines():
        if not line.startswith("#"):
            yield Requirement(line)


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the packaged files, because setuptools writes next to the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", target, source], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_contains_exactly_the_files_of_the_packages(source: Path, wheel: Path) -> None:
    expected = {
        path.relative_to(source).as_posix()
        for name in PACKAGES
        for path in (source / name).rglob("*")
        if path.is_file()
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert any(name.startswith("conf/") and name.endswith(".yaml") for name in names)


def test_the_installed_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True, timeout=240)
    # PYTHONPATH comes before the editable install of the repository.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    code = "import launcher, conf, models; print(launcher.__file__, conf.__file__, models.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert where.stdout.count(str(target)) == 3, where.stdout + where.stderr
    for command in ([sys.executable, "-m", "launcher"], [target / "bin" / "launch"]):
        done = subprocess.run(
            [*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"], "--help wrote into the calling directory"


# --- dependencies ---------------------------------------------------------------------------------------------------


def test_declared_dependencies() -> None:
    promised = ["torch>=2.11,<2.14", "ray[default,train]>=2.58,<2.61", "hydra-core>=1.3.8,<1.4", "tensorboard>=2.21"]
    assert set(promised) <= set(PROJECT["dependencies"])
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(">=3.11,<3.14")
    assert set(EXTRAS) <= {"examples", "azure", "test", "bench"}


def third_party(package: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (module, location, whether it runs at import time) of every import of a third-party module."""
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {
            node
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(outer)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module] if node.module and node.level == 0 else []
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in PACKAGES:
                    yield top, f"{path.relative_to(ROOT)}:{node.lineno}", node not in inner


# Loaded by `azure/kind.py` alone, which reports a missing extra; see test_cluster_azure_without_its_extra_is_reported.
LOADED_WITH_THE_EXTRA = tuple(f"launcher/clusters/azure/{module}.py" for module in ("api", "provider"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imported_packages_are_declared(package: str) -> None:
    """A direct requirement of a declared package counts as well, as omegaconf does for hydra-core.

    What only the extras `examples` and `azure` bring may be imported inside functions, and by LOADED_WITH_THE_EXTRA.
    """
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        for below in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(below)
            markers = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in markers):
                declared.add(canonicalize_name(needed.name))
    optional = {canonicalize_name(Requirement(text).name) for text in (*EXTRAS["examples"], *EXTRAS["azure"])}
    optional.add(canonicalize_name("IPython"))  # imported only where it runs: in a notebook
    distributions = importlib.metadata.packages_distributions()
    wrong = []
    for module, where, at_import in third_party(package):
        owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
        at_import = at_import and not where.startswith(LOADED_WITH_THE_EXTRA)
        if not owners & declared and (at_import or not owners & optional):
            wrong.append(f"{where} imports {module}")
    assert wrong == []


def test_cluster_azure_without_its_extra_is_reported() -> None:
    """The modules of all verbs load without Azure's packages; `up` names the extra to install."""
    script = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("azure", "msrest", "msrestazure"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import launcher.cli
from launcher.config.cluster_kinds import find
from launcher.errors import ClusterError

for module in pkgutil.iter_modules(launcher.cli.__path__, "launcher.cli."):
    importlib.import_module(module.name)
try:
    find("azure").remove("a", print)
except ClusterError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "launch-train[azure]" in done.stdout


# --- constraints.txt ------------------------------------------------------------------------------------------------


def test_every_pin_is_one_version_for_every_machine() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    assert CONSTRAINTS.startswith("#")
    assert "make lock" in CONSTRAINTS
    # A local version, a path, an address or an option would work only on the machine that wrote the file.
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.!]+( ; [^/@+]+)?", line)] == []
    assert lines == sorted(lines)
    names = [pin.name for pin in pins()]
    assert len(names) == len(set(names)), "two versions of one package"


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins()}
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)], prereleases=True), text
    # Packages of PyTorch's GPU build are included, although this machine may have no GPU.
    assert {"triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"} <= set(pinned)


def test_installed_versions_are_the_pinned_ones() -> None:
    """The tests run with the versions of constraints.txt. Otherwise run `make lock`, or create .venv again."""
    differing = []
    for pin in pins():
        try:
            installed = Version(importlib.metadata.version(pin.name)).public
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if not pin.specifier.contains(installed, prereleases=True):
            differing.append(f"{pin} is installed as {installed}")
    assert differing == []


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [
        ("torch==2.13.0+cpu\nabsl-py==2.5.1  # via x\n", ["absl-py==2.5.1", "torch==2.13.0"]),
        ("# header\n\nb==1 ; sys_platform == 'linux'\na==2rc1", ["a==2rc1", "b==1 ; sys_platform == 'linux'"]),
        ("--index-url https://example.org/simple\na==1", None),
        ("torch @ file:///wheels/torch.whl", None),
        ("-e .", None),
    ],
)
def test_the_lock_keeps_pins_only(resolved: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(SystemExit, match="not a pin"):
            lock.normalise(resolved)
    else:
        assert lock.normalise(resolved) == expected


# --- locks/: packages of images and hosts -----------------------------------------------------------------------------


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    """Return each requirement of locks/linux.txt with its hashes, by name."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    text = (ROOT / "locks" / "linux.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if not line.startswith(("#", "-")):
            pin, *hashes = re.split(r"\s+--hash=", line.strip())
            requirement = Requirement(pin)
            found[canonicalize_name(requirement.name)] = requirement, hashes
    return found


def test_every_locked_package_has_hashes_and_the_tested_version() -> None:
    tested = {str(canonicalize_name(pin.name)): pin for pin in pins()}
    found = locked()
    assert "--require-hashes" in (ROOT / "locks" / "linux.txt").read_text().splitlines()
    for name, (requirement, hashes) in found.items():
        assert requirement.specifier == tested[name].specifier, name
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), name
    stated = [*PROJECT["dependencies"], *EXTRAS["examples"]]
    assert {canonicalize_name(Requirement(text).name) for text in stated} <= found.keys(), "make lock"
    # The packages that build a wheel without access to an index.
    assert "setuptools" in found


def test_the_base_image_is_pinned_by_digest() -> None:
    digest = "sha256:" + "0" * 64
    text = "ARG BASE=nvidia/cuda:13.0.2-runtime\nFROM ${BASE}\n"
    pinned = lock.pin_base(text, lambda name, tag: digest)
    assert pinned == f"ARG BASE=nvidia/cuda:13.0.2-runtime@{digest}\nFROM ${{BASE}}\n"
    assert lock.pin_base(pinned, lambda name, tag: digest) == pinned
    with pytest.raises(SystemExit, match="not a digest"):
        lock.pin_base(text, lambda name, tag: "latest")
    with pytest.raises(SystemExit, match="no line"):
        lock.pin_base("FROM x\n", lambda name, tag: digest)


def test_actions_are_pinned_by_commit() -> None:
    for file in (ROOT / ".github" / "workflows").glob("*.y*ml"):
        used = re.findall(r"uses:\s*(\S+)(.*)", file.read_text())
        assert used
        for action, comment in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{file.name}: {action}"
            assert re.search(r"# v\d", comment), f"{file.name}: {action} has no version in its comment"


# --- scripts --------------------------------------------------------------------------------------------------------


def make(*words: str, directory: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": str(directory), "LC_ALL": "C"}
    return subprocess.run(["make", *words], cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


def fake_interpreter(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a directory that contains only the Makefile."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


# PATH has an interpreter that does not run (a shim of a version manager) and one that is too old before a valid one.
SHIM = 'echo "shim: command not found" >&2; exit 127'
OLD = 'case "$*" in *ensurepip*) exit 1;; *) echo 3.9.2;; esac'


def test_make_skips_interpreters_that_do_not_fit(clone: Path) -> None:
    for name, body in {"python3": OLD, "python3.13": SHIM, "python3.12": f'exec "{sys.executable}" "$@"'}.items():
        fake_interpreter(clone / "bin", name, body)
    done = make(".venv/.created", directory=clone, path=f"{clone}/bin:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert "with python3.12" in done.stdout
    again = make(".venv/.created", directory=clone, path=f"{clone}/bin:/usr/bin:/bin")
    assert "Creating" not in again.stdout


@pytest.mark.parametrize("words", [["run"], ["test", "PYTHON=python3"]])
def test_make_names_the_missing_requirement(clone: Path, words: list[str]) -> None:
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        fake_interpreter(clone / "bin", name, OLD if name == "python3" else SHIM)
    (clone / "pyproject.toml").touch()
    (clone / "constraints.txt").touch()
    done = make(*words, directory=clone, path=f"{clone}/bin:/usr/bin:/bin")
    assert done.returncode == 2
    for part in ("Python 3.11, 3.12 or 3.13", "python3 is 3.9.2", "PYTHON="):
        assert part in done.stderr
    assert not (clone / ".venv").exists()


def test_make_installs_again_only_when_the_requirements_change(clone: Path) -> None:
    folder = clone / ".venv"
    for name in ("pyproject.toml", "constraints.txt"):
        (clone / name).touch()
        os.utime(clone / name, (1, 1))
    folder.mkdir()
    fake_interpreter(folder / "bin", "python", f'exec "{sys.executable}" "$@"')
    for stamp in (".created", ".installed", ".installed-test"):
        (folder / stamp).touch()
    plan = ("--dry-run", "--no-print-directory", "run", "test")
    assert "pip" not in make(*plan, directory=clone, path="/usr/bin:/bin").stdout
    os.utime(clone / "constraints.txt")
    for stamp in (".installed", ".installed-test"):
        os.utime(folder / stamp, (2, 2))
    assert make(*plan, directory=clone, path="/usr/bin:/bin").stdout.count("pip --disable") == 2


def test_make_rejects_a_python_that_differs_from_the_environment(clone: Path) -> None:
    (clone / ".venv").mkdir()
    fake_interpreter(clone / ".venv" / "bin", "python", f'exec "{sys.executable}" "$@"')
    (clone / ".venv" / ".created").touch()
    fake_interpreter(clone / "bin", "python9", "echo 3.9")
    done = make("venv-fits", "PYTHON=python9", directory=clone, path=f"{clone}/bin:/usr/bin:/bin")
    assert done.returncode == 2
    assert "make clean" in done.stderr


def test_make_help_lists_the_documented_targets() -> None:
    listed = make("help", directory=ROOT, path="/usr/bin:/bin").stdout
    for target in re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()):
        assert f"make {target} " in listed, target


def test_the_ci_script_fails_when_the_tests_fail(tmp_path: Path) -> None:
    """`make` fails, and all other programs exist, so that nothing is installed."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name in ("git", "chromium"):
        fake_interpreter(tmp_path / "bin", name, "")
    for body, status in (("exit 3", 3), ('test "$*" = test', 0)):
        fake_interpreter(tmp_path / "bin", "make", body)
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CI": "true"}
        done = subprocess.run(["bash", tmp_path / ".ci" / "run"], env=environment, timeout=240)
        assert done.returncode == status
