"""Restricts Hydra and OmegaConf while they compose an untrusted configuration.

Files are checked against `launcher.config.limits` before they are parsed, references are resolved within a budget, and
files of launch take precedence over files of the same name in a user's directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.base import Container, Node
from omegaconf.basecontainer import BaseContainer
from omegaconf.resolvers import oc
from yaml import YAMLError

from launcher.config import hydra_settings, limits, literal_text
from launcher.config.authority import ComposedFile
from launcher.config.search_path import CONF
from launcher.config.settings import Settings
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from hydra.plugins.config_source import ConfigResult

_MOST_FILES = 1000  # in one composition: files that include others can expand to billions
_BUDGET = 200_000  # values that references may bring into one composition
_COST = 200  # of a reference itself, whose text is parsed each time


class LimitedFiles(FileConfigSource):
    """Hydra's source of files, which checks the limits before a file is parsed, and then the settings of Hydra in it.

    Attributes:
        checks_hydra_settings: False while another program's Hydra is active, which uses these settings itself.
    """

    checks_hydra_settings = True

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        try:
            text = limits.read_text(file)
            limits.check_yaml(text, str(file))
            loaded = super().load_config(config_path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} cannot be read: {error}.") from error
        except YAMLError as error:
            raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
        package = (loaded.header.get("package") or "_group_").replace("_group_", config_path.rpartition("/")[0])
        parts = [part for part in re.split(r"[./]", package) if part not in ("_global_", "")]
        if self.checks_hydra_settings:
            _check_hydra_settings(loaded, parts, file)
        literal_text.restore(loaded.config, text, parts)
        return loaded


def _check_hydra_settings(loaded: ConfigResult, package: list[str], file: Path) -> None:
    content: Any = OmegaConf.to_container(loaded.config, resolve=False)
    defaults = content.get("defaults") if isinstance(content, dict) else None
    for part in reversed(package):
        content = {part: content}
    hydra_settings.check_file(content.get("hydra") if isinstance(content, dict) else None, defaults, file)


class _Exhausted(BaseException):
    """The budget is exhausted. Not an Exception, because OmegaConf must not catch it."""


@contextmanager
def within_limits() -> Iterator[None]:
    """Compose within the limits. Raises ConfigError if references exceed them."""
    registry = SourcesRegistry.instance()
    types, resolve = registry.types, Container._resolve_interpolation_from_parse_tree
    load = CachingConfigRepository.load_config
    left, depth, files = _BUDGET, 0, _MOST_FILES

    def limited(self: Container, *arguments: Any, **options: Any) -> Any:
        nonlocal left, depth
        if left < 0 or depth > limits.DEEPEST:
            raise _Exhausted
        depth += 1
        try:
            found = resolve(self, *arguments, **options)
        finally:
            depth -= 1
        left -= _COST + _size(found, left)
        return found

    def counted(self: CachingConfigRepository, config_path: str) -> ConfigResult | None:
        nonlocal files
        files -= 1
        if files < 0:
            raise _Exhausted
        return load(self, config_path)

    registry.types = {**types, "file": LimitedFiles}
    Container._resolve_interpolation_from_parse_tree = limited  # type: ignore[method-assign]
    CachingConfigRepository.load_config = counted  # type: ignore[method-assign]
    try:
        yield
    except _Exhausted:
        raise ConfigError(
            "The values of the configuration refer to each other (${...}), or its files include each other, too deep "
            f"or too often: more than {limits.DEEPEST} levels, {_BUDGET // _COST:,} references or {_MOST_FILES:,} "
            "files. Look for a value that refers to another one many times, and for long defaults lists."
        ) from None
    except RecursionError:
        raise ConfigError(
            "The configuration includes or refers to itself without an end. Look at its defaults lists, and at values "
            "with ${...}."
        ) from None
    finally:
        Container._resolve_interpolation_from_parse_tree = resolve  # type: ignore[method-assign]
        CachingConfigRepository.load_config = load  # type: ignore[method-assign]
        registry.types = types


def _size(node: Node | None, most: int) -> int:
    """Return the number of values that a reference has brought, or more than `most`."""
    count, waiting = 0, [node]
    while waiting and count <= most:
        one = waiting.pop()
        count += 1
        content = one._value() if isinstance(one, Node) else one
        if isinstance(one, BaseContainer) and isinstance(content, (dict, list)):
            waiting.extend(content.values() if isinstance(content, dict) else content)
        elif isinstance(content, str):
            count += len(content) // 100
    return count


@cache
def _shipped_options() -> Mapping[str, ConfigNode]:
    """Return the shipped options of `cluster` by file name. Hydra copies what it loads from them."""
    files = sorted((CONF / "cluster").glob("*.yaml"))
    return {
        file.name: ConfigNode(file.name, OmegaConf.structured(OmegaConf.load(file)), "cluster", "cluster", None)
        for file in files
    }


def find_ours_first(settings: Settings) -> None:
    """Give the schema and the shipped options of `cluster` precedence over files of the same names.

    settings: the user's, whose keys for a cluster are added to those options.
    """
    options = ConfigStore.instance().repo["cluster"] = dict(_shipped_options())
    for file in options:
        if keys := settings.keys_for(name := file.removesuffix(".yaml")):
            node = {**cast(dict[str, Any], OmegaConf.to_container(options[file].node)), **keys}
            ConfigStore.instance().store(group="cluster", name=name, node=node, package="cluster")
    loader = GlobalHydra.instance().config_loader()
    search_path = loader.get_search_path()
    search_path.prepend("schema", "structured://")
    loader.repository.initialize_sources(search_path)  # type: ignore[attr-defined]


@contextmanager
def without_environment() -> Iterator[list[str]]:
    """Hide environment variables from references. Yields the names of the requested variables."""
    asked: list[str] = []

    def refuse(key: str, default: Any = None) -> Any:
        asked.append(key)
        raise ValueError("no environment")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield asked
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def composed_files(overrides: list[str], primary: str, schema: str) -> list[ComposedFile]:
    """Return the files that Hydra composes for these overrides, in order."""
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(primary, overrides, RunMode.RUN).defaults
    found = []
    for default in defaults:
        loaded = loader.repository.load_config(str(default.config_path))  # type: ignore[attr-defined]
        if loaded is None or default.config_path == schema:
            continue
        package = default.package if default.package is not None else loaded.header.get("package")
        options = {
            f"{item.group.lstrip('/')}/{item.value}"
            for item in loaded.defaults_list or []
            if isinstance(item, GroupDefault) and item.group
        }
        content = OmegaConf.to_container(loaded.config, resolve=False)
        parts = str(package).split(".") if package else []
        found.append(ComposedFile(str(default.config_path), parts, content, frozenset(options)))
    return found
