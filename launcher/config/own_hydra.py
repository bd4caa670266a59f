"""A separate Hydra, isolated from the caller's: composition, and translation of its errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException, MissingConfigException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from launcher.config import cluster_kinds, hydra_settings, keys
from launcher.config.guarded_hydra import LimitedFiles, find_ours_first, within_limits
from launcher.config.replacing import ReplacingConfigLoader
from launcher.config.schema import job_schema
from launcher.config.search_path import Sources
from launcher.config.settings import Settings
from launcher.config.yaml_files import read_first
from launcher.errors import ConfigError, did_you_mean

SCHEMA = "launch_schema"  # the name of the typed schema in a defaults list
PRIMARY = "launch_primary"


@cache
def job_node() -> DictConfig:
    """Return the schema of a job as a node, which takes longer to create than to copy. Callers must not change it."""
    node = OmegaConf.structured(job_schema())
    assert isinstance(node, DictConfig)
    return node


@contextmanager
def own_hydra() -> Iterator[None]:
    """Use a separate Hydra for composition, and restore the caller's afterwards.

    Without this, a schema that a notebook keeps in the ConfigStore under the name `config` would be applied to our
    config.yaml, and a Hydra that is initialised already would refuse ours.
    """
    # Scans once per process and fills the ConfigStore: before ours is put in its place.
    plugins = Plugins.instance()
    plugins.register(
        import_module("hydra_plugins.launch_sweeper").LaunchSweeper
    )  # in case the caller's Hydra scanned before ours
    store = ConfigStore.instance()
    own = {name: store.repo[name] for name in ("hydra", "_dummy_empty_config_.yaml")}
    new: list[tuple[Any, str, Any]] = [
        (GlobalHydra.instance(), "hydra", None),
        (HydraConfig.instance(), "cfg", None),
        (JobRuntime.instance(), "conf", OmegaConf.create()),
        (VersionBase.instance(), "version_base", VersionBase.instance().version_base),
        (store, "repo", own),
    ]
    LimitedFiles.checks_hydra_settings = not GlobalHydra.instance().is_initialized()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, value in new:
        setattr(owner, name, value)
    try:
        with within_limits():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        setup_globals()  # registers Hydra's own resolvers again


def compose_with_hydra(
    overrides: Sequence[str], where: Sources, primary: Mapping[str, Any], settings: Settings
) -> DictConfig:
    """Compose within `own_hydra`; the result contains `hydra`. Raises ConfigError in our own terms.

    primary: the primary configuration, see `primary_node` and its like.
    """
    try:
        given = initialize(overrides, where, primary, settings)
        return hydra.compose(PRIMARY, given, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, where) from error
    except YAMLError as error:
        raise ConfigError(f"A configuration file is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, KeyError, TypeError, OSError, AssertionError) as error:
        raise ConfigError(f"The configuration cannot be composed: {error}.") from error


def initialize(overrides: Sequence[str], where: Sources, primary: Mapping[str, Any], settings: Settings) -> list[str]:
    """Configure Hydra's search path and schema. Returns the overrides for Hydra."""
    file = f"{SCHEMA}.yaml"
    ConfigStore.instance().repo[file] = ConfigNode(file, job_node(), None, None, None)  # `store` would create another
    ConfigStore.instance().store(name=PRIMARY, node=primary)
    GlobalHydra.instance().clear()  # of an earlier composition of ours
    hydra.initialize_config_dir(str(where.directories[0]), job_name="launch", version_base="1.3")
    OmegaConf.register_new_resolver("hydra", _hydra_value, replace=True)
    current = GlobalHydra.instance().hydra
    assert current is not None
    current.config_loader = ReplacingConfigLoader(current.config_loader.get_search_path())
    find_ours_first(settings)
    others = [f"file://{directory}" for directory in where.directories[1:]]  # not percent-encoded, as Hydra expects
    # A `pkg://` among the search paths would import that package: the list is ours alone.
    ours = ["hydra/sweeper=launch", *([f"hydra.searchpath={_quoted(others)}"] if others else [])]
    return [*overrides, *ours]


def _hydra_value(name: str) -> Any:
    """Resolve `${hydra:NAME}`. Raises ValueError for values that launch does not have."""
    hydra_settings.check_reference(name)
    return OmegaConf.select(cast(DictConfig, HydraConfig.get()), name)


def _quoted(values: Sequence[str]) -> str:
    return "[" + ",".join("'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" for value in values) + "]"


def primary_node(where: Sources, settings: Settings) -> dict[str, Any]:
    """Return the primary configuration of a new run: config.yaml, above the user's own settings.

    Hydra looks for it in its first directory alone, and a user's need not have one.
    """
    node = dict(read_first(where, "config.yaml") or {})
    if not GlobalHydra.instance().is_initialized():
        hydra_settings.check_file(node.get("hydra"), node.get("defaults"), f"{where.directories[0]}/config.yaml")
    if settings.root is not None:
        run = node.get("run") or {}
        node["run"] = {"root": settings.root, **run} if isinstance(run, Mapping) else run
    if settings.choice is not None:
        items = [item for item in node.get("defaults") or [] if not _chooses_cluster(item)]
        first = next((i for i, item in enumerate(items) if isinstance(item, Mapping)), len(items))
        node["defaults"] = [*items[:first], {"cluster": settings.choice}, *items[first:]]
    return node


def _chooses_cluster(item: Any) -> bool:
    return isinstance(item, Mapping) and any(str(key).split()[-1].lstrip("/") == "cluster" for key in item)


def decided_node(settings: Settings, cluster: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a primary configuration with only the settings that the user made; words apply over it.

    cluster: the section that the user's record has for a run that is stored; None for a new run.
    """
    choice = (settings.choice or cluster_kinds.one_with("is_default").name) if cluster is None else None
    root = {} if settings.root is None else {"run": {"root": settings.root}}
    return {"defaults": [SCHEMA, "_self_", {"cluster": choice}], "cluster": dict(cluster or {}), **root}


def stored_node(content: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """Return stored content as a primary configuration in which a word may choose every group of `groups`."""
    node: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for group in groups:
        *parents, last = group.split("/")
        holder: Any = node
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(last, None)
    return {"defaults": [SCHEMA, "_self_", *({group: None} for group in dict.fromkeys(groups))], **node}


def _explain(error: BaseException, where: Sources) -> ConfigError:
    """Convert an exception of Hydra or OmegaConf into an error of one paragraph in terms of launch."""
    groups = where.groups()
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        key = getattr(link, "full_key", None) or ""
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, option = link.missing_cfg_file.rpartition("/")
            known = groups.get(group, [])
            listing = f" There are: {', '.join(known)}." if known else ""
            return ConfigError(
                f'There is no configuration file "{link.missing_cfg_file}.yaml" in '
                f"{' or '.join(str(d) for d in where.directories)}.{did_you_mean(option, known)}{listing}",
                key=group,
            )
        if isinstance(link, (ConfigKeyError, ConfigAttributeError)) and key and not keys.is_known(key):
            hint = keys.explain_unknown(key, groups)
            if key in groups or key == "local":
                hint = f' If {key} is a directory of yours, its files begin with "# @package _global_".'
            return ConfigError(f'{_file_of(error)}there is no key "{key}".{hint}', key=key)
        if isinstance(link, ValidationError) and key:
            return ConfigError(f"{_file_of(error)}{wrong_type(key, link)}", key=key)
    reason = next((text for text in (str(link).strip() for link in reversed(chain)) if text), type(error).__name__)
    return ConfigError(f"{_file_of(error)}{' '.join(reason.partition('full_key:')[0].split())}")


def wrong_type(key: str, error: BaseException) -> str:
    """Return the error for a value of the wrong type: the expected type, and the value."""
    found = " ".join(str(error).splitlines()[0].split()).rstrip(".")
    expected = f"{key} must be {keys.type_name(key)}" if key in keys.leaves() else key
    return f"{expected}: {found}."


def _file_of(error: BaseException) -> str:
    """Return the file that Hydra names in an error, as in `In 'experiment/mine': ...`."""
    text = str(error)
    if not text.startswith("In '"):
        return ""
    name = text[4:].partition("'")[0]
    return f"{'config' if name == PRIMARY else name}.yaml: "
