"""Drops the keys of a section's previous class when a file or a word names another class.

Hydra merges the files of a configuration key by key. Without this module the `weight_decay` that `optimizer/adamw.yaml`
has for AdamW would also reach the `torch.optim.Adam` of a later file or word, whose user never wrote it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from launcher.config.schema import OPEN_SECTIONS
from launcher.config.search_path import CONF

# These are independent of the class: frozen parameters, and requirements of an overlay on any class.
_STAYS = ("_target_", "groups", "_if_taken_")


class ReplacingConfigLoader(ConfigLoaderImpl):
    """Merges the files of a defaults list; a file that replaces the `_target_` of an open section drops its keys.

    Two kinds of keys stay: those that a file of the user's own gives to a section without naming its class, and those
    that a word of the command line deletes, so that the deletion finds them.
    """

    def _parse_overrides_and_create_caching_repo(self, config_name: str | None, overrides: list[str]) -> Any:
        self._words, repo = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        return self._words, repo

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        written = {word.key_or_group for word in self._words if word.is_delete()}
        whole = OmegaConf.create()
        with flag_override(whole, "no_deepcopy_set_nodes", True):
            for default in defaults:
                layer = super()._compose_config_from_defaults_list([default], repo)
                targets = dict(_targets(layer))
                _drop(whole, targets, written)
                if self._is_own(default, repo):
                    written |= set(_keys_without_class(layer))
                try:
                    whole.merge_with(layer)
                except OmegaConfBaseException as error:
                    raise ConfigCompositionException(
                        f"In '{default.config_path}': {type(error).__name__}: {error}"
                    ).with_traceback(sys.exc_info()[2]) from error
        _drop(whole, self._targets_of_words(), written)
        return whole

    def _is_own(self, default: Any, repo: Any) -> bool:
        if default.primary:
            return False
        path = str(repo.load_config(config_path=default.config_path).path)
        return path.startswith("file://") and Path(path.removeprefix("file://")) != CONF

    def _targets_of_words(self) -> dict[str, Any]:
        """Return dotted key of a section -> the class that the words of the command line name for it."""
        found: dict[str, Any] = {}
        for word in self._words:
            key, value = word.key_or_group, word.value()
            if key.partition(".")[0] not in OPEN_SECTIONS or word.is_delete():
                continue
            if key.endswith("._target_"):
                found[key.removesuffix("._target_")] = value
            elif isinstance(value, Mapping):
                found.update({at: target for at, target, _ in _walk(value, key) if target is not None})
        return found


def _targets(layer: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key of a section, its `_target_`) for the open sections of a layer, outer ones first."""
    for at, target, _ in _walk_open(layer):
        if target is not None:
            yield at, target


def _keys_without_class(layer: DictConfig) -> Iterator[str]:
    """Yield the dotted keys of sections that name no class in this layer."""
    for at, target, keys in _walk_open(layer):
        if target is None:
            yield from (f"{at}.{key}" for key in keys)


def _walk_open(layer: DictConfig) -> Iterator[tuple[str, Any, list[str]]]:
    plain = OmegaConf.to_container(layer, resolve=False)
    assert isinstance(plain, dict)
    for name in OPEN_SECTIONS:
        if name != "vars":
            yield from _walk(plain.get(name), name)


def _walk(value: Any, at: str) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield (dotted key, `_target_` or None, keys) of a mapping and of those in it. Lists are replaced as a whole."""
    if isinstance(value, Mapping):
        yield at, value.get("_target_"), [str(key) for key in value]
        for key, item in value.items():
            yield from _walk(item, f"{at}.{key}")


def _drop(whole: DictConfig, targets: Mapping[str, Any], written: set[str]) -> None:
    """Remove the keys of the sections whose class `targets` replaces, but for those in `written`."""
    for at, target in targets.items():
        section = OmegaConf.select(whole, at, throw_on_resolution_failure=False)
        if not isinstance(section, DictConfig) or section._is_none() or section._is_missing():
            continue
        plain = OmegaConf.to_container(section, resolve=False)
        assert isinstance(plain, dict)
        if plain.get("_target_") in (None, target):
            continue
        with flag_override(section, ["readonly", "struct"], False):
            for key in map(str, plain):
                if key not in _STAYS and f"{at}.{key}" not in written:
                    section.pop(key, None)
