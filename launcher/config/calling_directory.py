"""Puts the calling directory on the module path: its modules have precedence, and shadow nothing that launch needs.

    guard(directory)                    # nothing protected is imported from it, even where it is on the path
    add_calling_directory(directory)    # also: its modules can be imported, before installed ones of the same name

Protected are the standard library, launch, and the packages that launch declares as dependencies, with all that those
depend on. A `models` or `conf` of the user's own is merged with ours, file by file, the user's first.

The directory stands at the end of `sys.path`, and a finder gives its modules precedence. So a process that has no
finder, such as one of a DataLoader, finds the user's modules as well, and still none that shadows an installed one.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = Path(__file__).resolve().parents[2]
SHARED = ("models", "conf")  # our top-level packages whose names users are likely to take as well
# Always launch's own, because launch may be on the path without being installed.
_OWN = frozenset({"launcher", "hydra_plugins"})
# The directory of a cluster on a host with SSH access, in the environment of its Ray. Homes of hosts may differ, so a
# driver names a directory in it by this reference, which every worker resolves with its own value.
CLUSTER = "LAUNCH_CLUSTER"
_REFERENCE = f"${{{CLUSTER}}}"
_DISTRIBUTION = "launch-train"
_EXTRAS = ("", "examples", "azure")  # what a command may import
# The dependencies in pyproject.toml, for nodes of a cluster where launch is copied and not installed.
DEPENDENCIES = (
    *("torch", "ray[default,train]", "hydra-core", "tensorboard", "rich", "optuna", "cmaes", "pyarrow", "xxhash"),
    *("scipy", "matplotlib", "detect-secrets", "pathspec"),
)
# Names that some packages install by mistake, beside their own.
_BY_MISTAKE = frozenset({"test", "tests", "example", "examples", "docs", "benchmarks", *SHARED})

_calling: list[Path] = []  # whose modules may be imported
_guarded: list[Path] = []  # whose modules shadow nothing


def calling_directories() -> list[Path]:
    """Return the directories whose modules a configuration may name, the last one added first."""
    return list(_calling)


def shared_path(directory: str | Path) -> str:
    """Return the path of a directory for other hosts: a reference if it is in the directory of the cluster."""
    own = os.environ.get(CLUSTER)
    if own and Path(directory).is_relative_to(own):
        return str(Path(_REFERENCE, Path(directory).relative_to(own)))
    return str(directory)


def own_path(directory: str | Path) -> Path:
    """Return the path on this host for the result of `shared_path` on another host."""
    return Path(str(directory).replace(_REFERENCE, os.environ.get(CLUSTER, _REFERENCE)))


def guard(directory: str | Path) -> None:
    """Prevent imports of protected modules from a directory, whether or not it is on the module path."""
    path = Path(directory).resolve()
    if path not in _guarded and not _holds_packages(path):
        _guarded.insert(0, path)
    if not any(isinstance(finder, CallingDirectoryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CallingDirectoryFinder())
        PathFinder.find_distributions = staticmethod(_find_distributions)  # type: ignore[method-assign]


def add_calling_directory(directory: str | Path) -> None:
    """Make the modules of `directory` importable and trusted; see the module's docstring."""
    path = own_path(directory).resolve()
    guard(path)
    if path not in _calling:
        _calling.insert(0, path)
    if str(path) not in sys.path:
        sys.path.append(str(path))
    importlib.invalidate_caches()
    for name in SHARED:
        module = sys.modules.get(name)
        if module is not None:  # imported before this directory was known
            module.__path__ = _shared_locations(name, list(getattr(module, "__path__", [])))


def shadows(name: str) -> str | None:
    """Return who owns the name of a module that is therefore not imported from a guarded directory; None otherwise."""
    if PathFinder.find_spec(name, [str(path) for path in _guarded]) is None:
        return None
    if name in sys.stdlib_module_names:
        return "Python's standard library"
    return "launch or a package that it depends on" if _is_protected(name) and _find_installed(name) else None


class Entrance:
    """Adds the calling directories of one process to another, when that process unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[list[str]]]:
        return _enter, ([str(path) for path in reversed(_calling)],)


def _enter(directories: Sequence[str]) -> None:
    for directory in directories:
        add_calling_directory(directory)


class CallingDirectoryFinder(MetaPathFinder):
    """Decides between a module of a guarded directory and another of the same name."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if "." in fullname:
            return None
        if fullname in SHARED and _calling:
            return _find_shared(fullname)
        own = PathFinder.find_spec(fullname, [str(directory) for directory in _guarded])
        if own is None:
            return None
        if own.loader is None:  # a folder without __init__.py: any real module comes before it
            other = _find_installed(fullname)
            merges = other is None or other.loader is not None or not _is_protected(fullname)
            return None if merges else other
        if fullname in sys.stdlib_module_names:
            other = _find_installed(fullname)
            if other is None:  # a module of another system, which packages try to import
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
            return other
        # Whether a name is protected takes reading the metadata of all packages, and matters for two modules alone.
        other = _find_installed(fullname)
        if other is not None and _is_protected(fullname):
            return other
        return PathFinder.find_spec(fullname, [str(directory) for directory in _calling])


def _find_shared(name: str) -> ModuleSpec | None:
    """Make a user's `models` (a package, a bare folder or a file) and ours one package, the user's files first."""
    # Not by `sys.path`: an installed package that happens to be called `models` is neither the user's nor ours.
    spec = PathFinder.find_spec(name, [str(directory) for directory in [*_calling, HOME]])
    if spec is not None:
        spec.submodule_search_locations = _shared_locations(name, list(spec.submodule_search_locations or []))
    return spec


def _shared_locations(name: str, found: list[str]) -> list[str]:
    own = [str(directory / name) for directory in [*_calling, HOME] if (directory / name).is_dir()]
    return list(dict.fromkeys([*own, *found]))


def _find_installed(name: str) -> ModuleSpec | None:
    """Find a module as if the guarded directories were not on the path."""
    path = _installed_path()
    for finder in sys.meta_path:
        if isinstance(finder, CallingDirectoryFinder):
            continue
        spec = PathFinder.find_spec(name, path) if finder is PathFinder else finder.find_spec(name, None)
        if spec is not None:
            if spec.loader is None and spec.submodule_search_locations is not None:
                spec.submodule_search_locations = list(spec.submodule_search_locations)  # else it follows `sys.path`
            return spec
    return None


def _installed_path() -> list[str]:
    return [entry for entry in sys.path if Path(os.path.realpath(entry or ".")) not in _guarded]


def _find_distributions(*arguments: Any, **options: Any) -> Iterator[Any]:
    """Exclude guarded directories when all packages are listed: `import torch` loads the plugins that they name."""
    context = arguments[0] if arguments else options.get("context", DistributionFinder.Context())
    if context.name is None and "path" not in vars(context):
        context = DistributionFinder.Context(path=_installed_path())
    return iter(MetadataPathFinder.find_distributions(context))


def _holds_packages(path: Path) -> bool:
    """Return whether a directory holds installed packages, launch itself or Python: those modules are the real ones."""
    return path in (HOME, Path(os.__file__).resolve().parent) or path.name in ("site-packages", "dist-packages")


# ---- dependencies of launch -----------------------------------------------------------------------------------------

_reading: Any = threading.local()


def _is_protected(name: str) -> bool:
    """Return whether a top-level name belongs to launch or to one of its dependencies."""
    if name in _OWN or getattr(_reading, "now", False):  # modules that read the metadata are protected as well
        return True
    _reading.now = True
    try:
        return name in dependency_modules()
    finally:
        _reading.now = False


@cache
def dependency_modules() -> frozenset[str]:
    """Return the top-level modules of all packages that launch needs, by the metadata of what is installed."""
    return frozenset(name for found in _dependencies() for name in _modules_of(found)) - _BY_MISTAKE


def _dependencies() -> Iterator[Any]:
    from packaging.requirements import Requirement

    left = [(_DISTRIBUTION, extra) for extra in _EXTRAS]
    seen: set[tuple[str, str]] = set()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            stated: Sequence[str] = DEPENDENCIES if name == _DISTRIBUTION else ()
        else:
            yield found
            stated = found.requires or ()
        for requirement in map(Requirement, stated):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(requirement.name, each) for each in ("", *requirement.extras)]


def _modules_of(distribution: Any) -> set[str]:
    stated = (distribution.read_text("top_level.txt") or "").split()
    if stated:
        return set(stated)
    names = set()
    for file in distribution.files or ():
        first = file.parts[0]
        if len(file.parts) > 1 and first.isidentifier() and not first.startswith("__"):
            names.add(first)
        elif file.suffix in (".py", ".so", ".pyd"):
            names.add(first.partition(".")[0])
    return names
