"""The allowed imports: `cli -> sweeps -> jobs -> planning, runners -> {clusters, engine}`, all use the leaves.

Imports are read from the source, so that those inside functions, in branches that are not executed, or under
TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

# Each part of launcher (a package or a module) and the other parts that it may import. A part that is not listed is
# an error, so that a new one is placed here deliberately.
LEAVES = {"errors", "config", "runs", "formatting", "startup_timing", "money", "terminal_text"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "formatting": set(),
    "startup_timing": set(),
    "terminal_text": set(),
    "money": set(),
    "config": {"errors"},
    "runs": {"errors", "config"},
    "ray_seam": {"errors"},
    "engine": LEAVES,
    "clusters": {"ray_seam"} | LEAVES,
    "runners": {"engine", "clusters", "ray_seam"} | LEAVES,
    "planning": {"engine", "clusters"} | LEAVES,
    "jobs": {"planning", "runners", "engine", "clusters"} | LEAVES,
    "sweeps": {"jobs", "planning", "runners", "engine", "clusters"} | LEAVES,
    "plugins": {"cli", "sweeps", "jobs"} | LEAVES,
    "driver": {"sweeps", "jobs", "planning", "clusters"} | LEAVES,
    "cli": {"sweeps", "jobs", "planning", "clusters"} | LEAVES,
    "api": {"sweeps", "jobs", "cli"} | LEAVES,
    "__main__": {"cli"},
    "__init__": {"api"},
}
# The rooms of a package, where their order matters: each may import those before it.
WITHIN: dict[str, tuple[str, ...]] = {
    "config": (
        *(
            "cluster_kinds",
            "schema",
            "secret_forms",
            "masking",
            "keys",
            "hydra_settings",
            "literal_text",
            "key_help",
            "limits",
            "authority",
            "checks",
            "overrides",
            "search_path",
            "yaml_files",
        ),
        *(
            "settings",
            "guarded_hydra",
            "replacing",
            "own_hydra",
            "calling_directory",
            "targets",
            "resolvers",
            "composition",
            "__init__",
        ),
    ),
    "runs": (
        *("secret_files", "masked_patch", "plain_files", "results", "store_copies", "directory", "user_state"),
        *("gathered", "storage", "mirror", "host_logs", "provenance", "curves", "__init__"),
    ),
    "planning": ("plan", "hosts", "forecast", "nodes", "tables"),
    "jobs": ("prepare", "ranks", "weights", "record", "remote", "training", "trained"),
}


@dataclass(frozen=True)
class Rule:
    """Modules under `who`, except those under `but`, never import anything under `never`."""

    who: str
    never: tuple[str, ...]
    but: tuple[str, ...] = ()
    at_import: bool = False  # only imports that run when the module is imported
    why: str = ""


_RAY_TRAIN = (
    "launcher.ray_seam",
    "launcher.runners.ray_train",
)

# Modules of Ray that promise nothing: a release may rename any of them.
_PRIVATE_RAY = (
    *("ray._private", "ray._raylet", "ray._common", "ray.core", "ray.dashboard", "ray.experimental", "ray.scripts"),
    *("ray.autoscaler", "ray.job_config", "ray.train.v2", "ray.train._internal", "ray.data._internal"),
)

RULES = (
    Rule("launcher.engine", ("ray", "hydra", "omegaconf"), why="the engine runs without Ray, and on plain data"),
    Rule(
        "launcher",
        ("ray",),
        but=("launcher.runners", "launcher.clusters", "launcher.ray_seam"),
        why="Ray stays behind three packages",
    ),
    Rule(
        "launcher",
        _PRIVATE_RAY,
        but=("launcher.ray_seam", "launcher.clusters.azure"),
        why="what is not Ray's public API has one place, where it is explained and tested",
    ),
    Rule("launcher", ("ray.train",), but=_RAY_TRAIN, why="few modules speak to Ray Train"),
    Rule("launcher.clusters", ("torch",), why="a cluster is planned on machines without PyTorch"),
    Rule("launcher.runs", ("torch",), why="`launch runs` lists without PyTorch"),
    Rule("launcher.engine.strategies.kinds", ("torch",), at_import=True, why="options are checked without PyTorch"),
    Rule("launcher.engine.registry", ("torch",), why="kinds of strategies are registered without PyTorch"),
    Rule(
        "launcher",
        ("hydra", "omegaconf"),
        but=(
            "launcher.config.composition",
            "launcher.config.own_hydra",
            "launcher.config.guarded_hydra",
            "launcher.config.replacing",
            "launcher.config.resolvers",
            "launcher.config.yaml_files",
            "launcher.cli.hydra_help",
            "launcher.plugins",
            "launcher.sweeps.plugin",
            "launcher.sweeps.syntax",
        ),
        why="configuration is composed once, and plain data afterwards",
    ),
    Rule("launcher", ("models", "conf", "tests", "benchmarks"), why="only configuration names both"),
    Rule("models", ("launcher", "conf", "ray", "hydra", "omegaconf", "tests"), why="a model is plain PyTorch"),
    *(
        Rule(
            who,
            ("torch", "ray", "tensorboard"),
            but=("launcher.cli.board_data",),  # which only the process of TensorBoard imports
            at_import=True,
            why="`launch --help` answers at once",
        )
        for who in ("launcher.cli", "launcher.config", "launcher.runs")
    ),
)


@dataclass(frozen=True)
class Import:
    name: str  # dotted
    line: int
    at_import: bool


def under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source, feature_version=(3, 11))))


def read_imports(source: str, package: str) -> list[Import]:
    """Return every module that a source names in an import; `package` is what its relative imports start from.

    `from a import b` counts as `a` and `a.b`, since b may be a module; so does `a.b` as an attribute after `import a`,
    and a literal handed to `import_module` or `__import__`.
    """
    nodes = nodes_of(source)
    deferred: set[ast.AST] = set()
    for node in nodes:
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing_only or isinstance(node, FUNCTIONS):
            deferred.update(ast.walk(node))
    found: list[Import] = []
    bound: dict[str, str] = {}
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.append(alias.name)
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            names.append(base)
            for alias in node.names:
                names.append(f"{base}.{alias.name}")
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.append(node.args[0].value)
        found += [Import(name, getattr(node, "lineno", 0), node not in deferred) for name in names]
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            found.append(Import(f"{bound[node.value.id]}.{node.attr}", node.lineno, node not in deferred))
    return found


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def find_violations(files: dict[str, str]) -> list[str]:
    """Check sources by their path in the repository; return one line for each broken rule."""
    broken = []
    for path, source in sorted(files.items()):
        module = module_name(path)
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        imports = read_imports(source, package)
        for rule in RULES:
            if not under(module, rule.who) or any(under(module, exempt) for exempt in rule.but):
                continue
            for seen in imports:
                if (seen.at_import or not rule.at_import) and any(under(seen.name, name) for name in rule.never):
                    broken.append(f"{path}:{seen.line} imports {seen.name}: {rule.why}")
        if path.startswith("launcher/"):
            broken += check_direction(path, imports, {module_name(other) for other in files})
    return sorted(set(broken))


def check_direction(path: str, imports: list[Import], modules: set[str]) -> list[str]:
    """Return the imports of one file of launcher that go against MAY_IMPORT. `modules`: the names of all modules."""
    part = path.split("/")[1].removesuffix(".py")
    if part not in MAY_IMPORT:
        return [f"{path}: {part!r} has no line in MAY_IMPORT of {Path(__file__).name}; add it where it belongs"]
    broken = []
    for seen in imports:
        words = seen.name.split(".")
        if words[0] != "launcher" or len(words) < 2:
            continue
        other = words[1]
        is_module = any(under(module, f"launcher.{other}") for module in modules) or other in MAY_IMPORT
        if not is_module:
            # Names that launcher/__init__ exports import cli; they are for users, not for the layers below.
            if other.startswith("__") or part in ("cli", "__main__", "__init__"):
                continue
            broken.append(f"{path}:{seen.line} imports {seen.name}: the package itself is for users of the API")
        elif other != part and other not in MAY_IMPORT[part]:
            broken.append(f"{path}:{seen.line} imports {seen.name}: {part} may import {sorted(MAY_IMPORT[part])}")
        elif other == part and len(words) > 2:
            broken += check_rooms(path, seen, words[2])
    return broken


def check_rooms(path: str, seen: Import, other: str) -> list[str]:
    """Return what is wrong with an import from one room of a package to another."""
    part, _, rest = path.removeprefix("launcher/").partition("/")
    order, own = WITHIN.get(part, ()), rest.split("/")[0].removesuffix(".py")
    if other == own or not order or other not in order:
        return []
    if own not in order:
        return [f"{path}: {own!r} has no place in WITHIN[{part!r}] of {Path(__file__).name}; add it where it belongs"]
    if order.index(other) < order.index(own):
        return []
    return [f"{path}:{seen.line} imports {seen.name}: in {part}, {own} comes before {other}"]


# Words that are also the name of a cluster kind, and mean something else there.
OTHER_MEANING = {
    ("launcher/config/schema.py", "none"): "of strategy.compression and sweep.pruner",
    ("launcher/config/own_hydra.py", "local"): "local/default.yaml of a configuration directory",
    ("launcher/config/calling_directory.py", "azure"): "an extra of the package",
    ("launcher/planning/plan.py", "none"): "of strategy.compression",
    ("launcher/planning/forecast.py", "none"): "of strategy.compression",
    ("launcher/clusters/azure/lifecycle.py", "ssh"): "the program",
    ("launcher/clusters/azure/ray_yaml.py", "none"): "no availability zone",
    ("launcher/engine/checkpoint/loading.py", "none"): "no section",
    ("launcher/engine/datasets.py", "none"): "no shape",
    ("launcher/engine/optimizer_check.py", "none"): "of strategy.compression",
    ("launcher/engine/strategies/kinds/auto.py", "none"): "of strategy.compression",
    ("launcher/engine/strategies/kinds/base.py", "none"): "of strategy.compression",
    ("launcher/engine/strategies/ddp.py", "none"): "of strategy.compression",
    ("launcher/sweeps/settings.py", "none"): "of sweep.pruner",
    ("launcher/sweeps/algorithms.py", "none"): "of sweep.pruner",
    ("launcher/runs/gathered.py", "none"): "no file",
    ("launcher/cli/machines.py", "ssh"): "a column of `launch status`",
    ("launcher/clusters/remote/shell.py", "ssh"): "the program",
}


def kinds_named(files: dict[str, str]) -> list[str]:
    """Return every literal of a cluster kind outside of its own folder: others ask the kind's object."""
    names = {
        path.split("/")[2] for path in files if path.startswith("launcher/clusters/") and path.endswith("/kind.py")
    }
    found = []
    for path, source in files.items():
        for node in nodes_of(source):
            word = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            own = path.startswith(f"launcher/clusters/{word}/")
            if path.startswith("launcher/") and word in names and not own and (path, word) not in OTHER_MEANING:
                found.append(f"{path}:{getattr(node, 'lineno', 0)} names the cluster kind {word}")
    return found


def test_no_kind_of_cluster_is_named_outside_of_its_folder() -> None:
    files = repository()
    assert kinds_named(files) == []
    other_kind = "launcher/clusters/azure/kind.py"
    for path in ("launcher/jobs/training.py", other_kind):
        planted = f"{files[path]}\n\ndef f(cluster):\n    return cluster.kind == 'ssh'\n"
        assert any(path in line for line in kinds_named({**files, path: planted}))


# Imports inside functions of launcher/: only where the time of `launch --help` or a missing extra requires them.
MOST_FUNCTION_IMPORTS = 150


def function_imports(files: dict[str, str]) -> int:
    """Return the number of import statements inside functions of launcher/."""
    found: set[ast.AST] = set()
    for path, source in files.items():
        if path.startswith("launcher/"):
            functions = [node for node in nodes_of(source) if isinstance(node, FUNCTIONS)]
            inside = {node for function in functions for node in ast.walk(function)}
            found |= {node for node in inside if isinstance(node, ast.Import | ast.ImportFrom)}
    return len(found)


def duplicate_classes(files: dict[str, str]) -> set[str]:
    """Return the class names that are defined more than once in launcher/."""
    sources = [source for path, source in files.items() if path.startswith("launcher/")]
    names = Counter(node.name for source in sources for node in nodes_of(source) if isinstance(node, ast.ClassDef))
    return {name for name, times in names.items() if times > 1}


def test_function_imports_are_counted() -> None:
    files = repository()
    count = function_imports(files)
    assert count <= MOST_FUNCTION_IMPORTS, "move imports to the top of their modules"
    assert function_imports({**files, "launcher/new.py": "def f():\n    import torch\n\n    import ray"}) == count + 2


def test_no_class_name_is_used_twice() -> None:
    """Would be wrong: two classes that a reader cannot distinguish by name."""
    files = repository()
    assert duplicate_classes(files) == set()
    assert duplicate_classes({**files, "launcher/new.py": "class Plan: ..."}) == {"Plan"}


def repository() -> dict[str, str]:
    paths = [path for folder in ("launcher", "models", "conf") for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_the_repository_keeps_the_direction() -> None:
    files = repository()
    assert {"launcher/errors.py", "launcher/engine/__init__.py"} <= set(files), "the check reads the wrong folder"
    assert find_violations(files) == []


def test_the_table_has_no_cycle() -> None:
    left = {part: set(others) for part, others in MAY_IMPORT.items()}
    while left:
        free = [part for part, others in left.items() if not others & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for part in free:
            del left[part]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("launcher/engine/trainer.py", "def f():\n    import ray", "trainer.py:2 imports ray:"),
        ("launcher/engine/trainer.py", "from omegaconf import DictConfig", "imports omegaconf:"),
        ("launcher/engine/trainer.py", "from ..runners import ray_train", "imports launcher.runners:"),
        ("launcher/engine/sinks/board.py", "from ... import cli", "imports launcher.cli:"),
        ("launcher/engine/trainer.py", "if TYPE_CHECKING:\n    from ray import ObjectRef", "imports ray:"),
        ("launcher/engine/trainer.py", "importlib.import_module('ray.util')", "imports ray.util:"),
        ("launcher/engine/trainer.py", "from launcher import launch", "imports launcher.launch:"),
        ("launcher/runners/in_process.py", "from ray import train", "imports ray.train:"),
        ("launcher/runners/in_process.py", "import ray\n\ndef f():\n    ray.train.report({})", "imports ray.train:"),
        ("launcher/runners/ray_train.py", "from launcher.sweeps import study", "imports launcher.sweeps:"),
        (
            "launcher/clusters/local/embedded_ray.py",
            "async def f(self):\n    import torch.cuda",
            "imports torch.cuda:",
        ),
        ("launcher/clusters/local/embedded_ray.py", "from launcher.engine import runtime", "imports launcher.engine:"),
        ("launcher/planning/plan.py", "import ray", "imports ray:"),
        ("launcher/runners/in_process.py", "import ray\n\nray._private.worker.connect()", "imports ray._private:"),
        (
            "launcher/clusters/gcs.py",
            "def f():\n    from ray._raylet import GcsClient",
            "imports ray._raylet:",
        ),
        (
            "launcher/clusters/local/embedded_ray.py",
            "from ray.experimental import internal_kv",
            "imports ray.experimental:",
        ),
        ("launcher/runners/ray_train.py", "from ray.train.v2.api import exceptions", "imports ray.train.v2.api:"),
        ("launcher/ray_seam/kv.py", "from launcher.clusters import gcs", "imports launcher.clusters:"),
        ("launcher/runners/in_process.py", "import hydra.utils", "imports hydra.utils:"),
        ("launcher/runs/directory.py", "from launcher.jobs import prepare", "imports launcher.jobs:"),
        ("launcher/errors.py", "from launcher import runs", "imports launcher.runs:"),
        ("launcher/runs/directory.py", "def f():\n    import torch", "imports torch:"),
        ("launcher/config/targets.py", "import torch", "imports torch:"),
        ("launcher/cli.py", "try:\n    import ray\nexcept ImportError: ...", "imports ray:"),
        ("launcher/engine/data.py", "from models.vision import ConvNet", "imports models.vision:"),
        ("launcher/runs/storage.py", "from launcher.runs import mirror", "in runs, storage comes before mirror"),
        ("launcher/jobs/newcomer.py", "from launcher.jobs.prepare import Request", "'newcomer' has no place in WITHIN"),
        ("launcher/newcomer.py", "", "'newcomer' has no line in MAY_IMPORT"),
        ("models/vision.py", "def f():\n    from launcher.errors import DataError", "imports launcher.errors:"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, expected: str) -> None:
    found = find_violations({path: source})
    assert any(path in line and expected in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launcher/config/targets.py", "def f():\n    import torch"),
        ("launcher/runners/ray_train.py", "import ray.train.torch\nfrom launcher.engine import entry"),
        ("launcher/clusters/local/embedded_ray.py", "import ray\nfrom launcher.errors import ResourceError"),
        ("launcher/clusters/azure/provider.py", "from ray.autoscaler._private import updater"),
        ("launcher/ray_seam/private.py", "def f():\n    import ray\n\n    ray._private.state.f()"),
        ("launcher/engine/trainer.py", "import torch\nfrom launcher import __version__, runs\nfrom .data import x"),
        ("launcher/cli/hydra_help.py", "from hydra import compose\nfrom launcher.config import sources"),
        ("launcher/engine/trainer.py", "import raylib, rayon.train"),
        ("models/vision.py", "import torch\nfrom models import common"),
    ],
)
def test_what_is_allowed_is_let_pass(path: str, source: str) -> None:
    assert find_violations({path: source}) == []
