"""Composition of a `Job` from `conf/`, a user's own directory and the words of the command line, with Hydra.

Few modules know Hydra and OmegaConf (`tests/test_imports.py` lists them), and all import them on use: everything else
that imports a dataclass from here stays light. Composition reads files and the environment; it instantiates nothing,
writes nothing, and leaves a Hydra that the caller uses for something else as it was. Hydra's own logging configuration,
callbacks and launchers are never acted on, whatever a file says about them, and its sweeper is always ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import keys, targets
from .errors import ConfigError, TrustError, did_you_mean
from .schema import (
    OPEN_SECTIONS,
    CheckpointConfig,
    ClusterConfig,
    Interval,
    Job,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    StrategyConfig,
    SweepConfig,
    TrainerConfig,
    check_run_name,
    check_values,
    default_run_name,
    parse_interval,
)
from .words import Plan, not_an_override, read_words, shown

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Composition",
    "Interval",
    "Job",
    "LoggingConfig",
    "RunConfig",
    "ScalingConfig",
    "StrategyConfig",
    "SweepConfig",
    "TrainerConfig",
    "check_run_name",
    "check_values",
    "compose",
    "default_run_name",
    "hydra_for",
    "parse_interval",
    "peek",
    "sources",
]

# By path and not as `pkg://conf`: a user's own package called `conf` may hide ours from the import system.
CONF = Path(__file__).resolve().parent.parent / "conf"
SCHEMA = "launch_schema"  # the name of the typed schema in a defaults list
_PRIMARY = "launch_primary"
# The `_target_`s that a hydra section may name. Only the sweeper is ever built, for `-m` (`launcher.sweeps.plugin`).
_HYDRA_TARGETS = frozenset(
    ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", "hydra_plugins.launch_sweeper.LaunchSweeper")
)


@dataclass(frozen=True)
class Composition:
    """What `compose` returns.

    job: complete, typed, interpolations resolved. words: as given. choices: configuration group -> chosen option.
    given: dotted keys and groups that the words name, without prefixes such as `+`. sweeper: `hydra.sweeper`, judged;
    its `params` are what files want to be swept.
    """

    job: Job
    words: list[str]
    choices: dict[str, Any]
    given: frozenset[str]
    unresolved: dict[str, Any] = field(repr=False)
    sweeper: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_yaml(self, run_name: str | None = None) -> str:
        """Return the configuration as YAML for the run's directory, to be read again through `stored`.

        run_name: the name that the run was given in the end.
        """
        from omegaconf import OmegaConf

        tree = self.tree()
        if run_name is not None:
            tree["run"] = {**tree["run"], "name": run_name}
        return OmegaConf.to_yaml(OmegaConf.create(tree))

    def tree(self, resolved: bool = False) -> dict[str, Any]:
        """Return the configuration as plain data, fit to be shown and kept.

        Literal secrets are ***, and `trust` is left out, since only a command line can give it. resolved: with the
        values of interpolations instead of as they were written.
        """
        tree = dataclasses.asdict(self.job) if resolved else self.unresolved
        masked = keys.mask({key: value for key, value in tree.items() if key != "trust"})
        assert isinstance(masked, dict)
        return masked

    def shown_words(self) -> list[str]:
        """Return the words with literal secrets as ***, fit for `overrides.yaml` and for the terminal."""
        return [shown(word) for word in self.words]


@dataclass(frozen=True)
class Sources:
    """The directories that groups are read from, first match first."""

    directories: tuple[Path, ...]

    def groups(self) -> dict[str, list[str]]:
        """Return every configuration group with its options."""
        found: dict[str, set[str]] = {}
        for directory in self.directories:
            for file in directory.rglob("*.yaml"):
                *parents, name = file.relative_to(directory).with_suffix("").parts
                if parents and not any(part.startswith((".", "__")) for part in parents):
                    found.setdefault("/".join(parents), set()).add(name)
        return {group: sorted(options) for group, options in sorted(found.items())}

    def read(self, name: str) -> Mapping[str, Any] | None:
        """Return the plain content of the first file of that name."""
        for directory in self.directories:
            if (directory / name).is_file():
                return _read_yaml(directory / name)
        return None


def sources(config_dir: Path | None = None) -> Sources:
    """Return where configuration is read from. Raises ConfigError for a directory that does not exist."""
    if config_dir is None:
        return Sources((CONF,))
    own = Path(config_dir).expanduser().resolve()
    if not own.is_dir():
        raise ConfigError(f"The configuration directory {config_dir} does not exist or is not a directory.")
    return Sources((own, CONF) if own != CONF else (CONF,))


def compose(words: Sequence[str], config_dir: Path | None = None, stored: Path | None = None) -> Composition:
    """Compose a job from the words of the command line; nothing is imported, instantiated or written.

    config_dir: a user's own groups, which win over ours of the same name. stored: a run's `config.yaml`, used in place
    of the groups; a group's word (`data=other`) then replaces the stored section as a whole, and the stored `run.name`,
    `run.resume` and `run.like`, which belong to the command and not to the job, are dropped.

    Raises ConfigError for what cannot be understood or breaks a rule, TrustError for a `_target_` outside the
    allow-list or a `trust` that does not come from the command line.
    """
    where = sources(config_dir)
    primary = None if stored is None else _read_stored(Path(stored))
    plan = _read_words(words, where, of_a_run=primary is not None)
    with _own_hydra():
        composed = _compose_with_hydra(plan, where, primary)
        tree, unresolved = _resolve(composed)
        hydra_tree = _hydra_node(composed)
        choices = _choices(composed)
    if tree.get("trust"):
        raise TrustError(
            f"trust is set to {tree['trust']} {_where_trusted(where, stored)}. A configuration cannot vouch for "
            "itself: give it on the command line, trust=[PACKAGE], if you know and trust that code."
        )
    tree["trust"] = unresolved["trust"] = list(plan.trust)
    for part in (tree, unresolved):
        _drop_wishes(part, plan.given)
    for section, target in targets.find_targets(hydra_tree, "hydra"):
        if target not in _HYDRA_TARGETS:
            raise TrustError(f"{section}._target_ is {target!r}, but launch runs nothing that a hydra section names.")
    targets.check(tree, plan.trust)
    masked = keys.find_masked({key: value for key, value in tree.items() if key != "vars"})
    if masked:
        names = keys.find_masked(unresolved) or masked
        raise ConfigError(
            f"{', '.join(names)}: the value was a secret, which is never written to config.yaml. Give it again on the "
            f"command line, {names[0]}=..., or refer to an environment variable, ${{oc.env:NAME}}."
        )
    job = _to_job(tree)
    check_values(job)
    return Composition(job, list(words), choices, plan.given, unresolved, hydra_tree["sweeper"])


def peek(words: Sequence[str], config_dir: Path | None, section: str) -> Any:
    """Return one section of what the words compose to (`run`: a RunConfig), where the rest may still lack values.

    For what has to be known before it is known which configuration the words apply to. Raises ConfigError.
    """
    where = sources(config_dir)
    with _own_hydra():
        composed = _compose_with_hydra(_read_words(words, where, of_a_run=False), where, None)
        tree, _ = _resolve(composed, only=section)
    return _to_section(section, tree[section])


@contextmanager
def hydra_for(words: Sequence[str], config_dir: Path | None = None) -> Iterator[tuple[Any, str, list[str]]]:
    """Give (Hydra's own `Hydra`, name of the primary configuration, overrides) for what only Hydra can show."""
    where = sources(config_dir)
    with _own_hydra():
        overrides = _initialize_hydra(_read_words(words, where, of_a_run=False), where, None)
        from hydra.core.global_hydra import GlobalHydra

        yield GlobalHydra.instance().hydra, _PRIMARY, overrides


def _drop_wishes(tree: Mapping[str, Any], given: frozenset[str]) -> None:
    """A word of the command line stands above what an overlay wishes for."""
    for key in given:
        section, _, name = key.partition(".")
        holder = tree.get(section)
        wishes = holder.get(targets.IF_TAKEN) if isinstance(holder, dict) else None
        if isinstance(wishes, dict):
            wishes.pop(name, None)


# --- the words of the command line ------------------------------------------------------------------------------------


def _read_words(words: Sequence[str], where: Sources, of_a_run: bool) -> Plan:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    groups = where.groups()
    parsed = []
    for word in words:
        try:
            parsed.append((word, parser.parse_override(word)))
        except HydraException as error:
            raise ConfigError(not_an_override(word, groups, str(error).splitlines()[0])) from None
    return read_words(parsed, groups, None if of_a_run else _listed_groups(where))


def _listed_groups(where: Sources) -> frozenset[str]:
    """Return the groups in the defaults list of the primary config.yaml."""
    content = where.read("config.yaml") or {}
    found = set()
    for item in content.get("defaults") or []:
        for name in item if isinstance(item, Mapping) else []:
            group = str(name).removeprefix("optional ").removeprefix("override ").partition("@")[0]
            found.add(group.strip().lstrip("/"))
    return frozenset(found)


# --- Hydra ------------------------------------------------------------------------------------------------------------


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Give composition a Hydra of its own, and the caller's back afterwards.

    Without this, a schema that a notebook keeps in the ConfigStore under the name `config` would be applied to our
    config.yaml, and a Hydra that is initialised already would refuse ours.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase
    from omegaconf import OmegaConf

    # Scans once per process and fills the ConfigStore: before ours is put in its place.
    plugins = Plugins.instance()
    plugins.register(import_module("hydra_plugins.launch_sweeper").LaunchSweeper)  # had it scanned before us
    store = ConfigStore.instance()
    own = {name: store.repo[name] for name in ("hydra", "_dummy_empty_config_.yaml")}
    new: list[tuple[Any, str, Any]] = [
        (GlobalHydra.instance(), "hydra", None),
        (HydraConfig.instance(), "cfg", None),
        (JobRuntime.instance(), "conf", OmegaConf.create()),
        (VersionBase.instance(), "version_base", VersionBase.instance().version_base),
        (store, "repo", own),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, value in new:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _compose_with_hydra(plan: Plan, where: Sources, primary: Mapping[str, Any] | None) -> DictConfig:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        overrides = _initialize_hydra(plan, where, primary)
        return hydra.compose(_PRIMARY, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, where)) from error
    except YAMLError as error:
        raise ConfigError(f"A configuration file is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, KeyError, TypeError, OSError, AssertionError) as error:
        raise ConfigError(f"The configuration cannot be composed: {error}.") from error


def _initialize_hydra(plan: Plan, where: Sources, primary: Mapping[str, Any] | None) -> list[str]:
    """Tell Hydra where everything is. Returns the overrides that it is to be given."""
    import hydra
    from hydra.core.config_store import ConfigStore

    # Hydra looks for the primary configuration in its first directory alone, and a user's need not have one.
    node = _stored_node(primary, plan.groups) if primary is not None else where.read("config.yaml") or {}
    if "searchpath" in (node.get("hydra") or {}):
        raise ConfigError("hydra.searchpath in config.yaml is not supported: --config-dir names the one directory.")
    ConfigStore.instance().store(name=SCHEMA, node=Job)
    ConfigStore.instance().store(name=_PRIMARY, node=node)
    hydra.initialize_config_dir(str(where.directories[0]), job_name="launch", version_base="1.3")
    others = [directory.as_uri() for directory in where.directories[1:]]
    # A `pkg://` among the search paths would import that package: the list is ours alone.
    ours = ["hydra/sweeper=launch", *([f"hydra.searchpath={_quoted(others)}"] if others else [])]
    return [*plan.overrides, *ours]


def _quoted(values: Sequence[str]) -> str:
    return "[" + ",".join("'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" for value in values) + "]"


def _stored_node(content: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """The stored content as a primary configuration in which every group of `groups` can be chosen anew."""
    node: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for group in groups:
        *parents, last = group.split("/")
        holder: Any = node
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(last, None)
    return {"defaults": [SCHEMA, "_self_", *({group: None} for group in dict.fromkeys(groups))], **node}


def _explain(error: BaseException, where: Sources) -> str:
    """Turn what Hydra or OmegaConf raised into one paragraph in our own terms."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

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
            return (
                f'There is no configuration file "{link.missing_cfg_file}.yaml" in '
                f"{' or '.join(str(d) for d in where.directories)}.{did_you_mean(option, known)}{listing}"
            )
        if isinstance(link, (ConfigKeyError, ConfigAttributeError)) and key and not keys.is_known(key):
            hint = keys.explain_unknown(key, groups)
            if key in groups or key == "local":
                hint = f' If {key} is a directory of yours, its files begin with "# @package _global_".'
            return f'{_file_of(error)}there is no key "{key}".{hint}'
        if isinstance(link, ValidationError) and key:
            return f"{_file_of(error)}{_wrong_type(key, link)}"
    reason = next((text for text in (str(link).strip() for link in reversed(chain)) if text), type(error).__name__)
    return f"{_file_of(error)}{' '.join(reason.partition('full_key:')[0].split())}"


def _wrong_type(key: str, error: BaseException) -> str:
    found = " ".join(str(error).splitlines()[0].split()).rstrip(".")
    expected = f"{key} must be {keys.type_name(key)}" if key in keys.LEAVES else key
    return f"{expected}: {found}."


def _file_of(error: BaseException) -> str:
    """Hydra says `In 'experiment/mine': ...` where a file is to blame."""
    text = str(error)
    if not text.startswith("In '"):
        return ""
    name = text[4:].partition("'")[0]
    return f"{'config' if name == _PRIMARY else name}.yaml: "


# --- from OmegaConf to plain data ------------------------------------------------------------------------------------


def _resolve(composed: DictConfig, only: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration as plain data, with interpolations resolved and as they were written.

    only: the one section whose interpolations are resolved.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

    try:
        HydraConfig.instance().set_config(composed)  # for ${hydra:runtime.cwd}
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        # Typed once more: a config.yaml of the user's own may have left out the schema.
        typed = OmegaConf.merge(OmegaConf.structured(Job), own)
        assert isinstance(typed, DictConfig)
        unresolved = OmegaConf.to_container(typed, resolve=False)
        OmegaConf.set_struct(typed, False)
        typed["hydra"] = composed["hydra"]
        tree = {}
        for name in [only] if only else [item.name for item in dataclasses.fields(Job)]:
            value = typed[name]
            is_node = OmegaConf.is_config(value)
            tree[name] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_node else value
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value yet (???). Give it: {error.full_key}=...") from error
    except InterpolationResolutionError as error:
        reason = " ".join(str(error).splitlines()[0].split())
        if "Environment variable" in reason:
            variable = reason.partition("Environment variable '")[2].partition("'")[0]
            raise ConfigError(
                f"{error.full_key} needs the environment variable {variable}, which is not set: set it, "
                "or give the key a value."
            ) from error
        raise ConfigError(f"{error.full_key} cannot be interpolated: {reason}.") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        if key and not keys.is_known(key):
            raise ConfigError(f'There is no key "{key}".{keys.explain_unknown(key)}') from error
        raise ConfigError(_wrong_type(key, error) if key else " ".join(str(error).split())) from error
    assert isinstance(unresolved, dict)
    return tree, {str(key): value for key, value in unresolved.items()}


def _hydra_node(composed: DictConfig) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(composed["hydra"], resolve=False)


def _choices(composed: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(composed["hydra"]["runtime"]["choices"])
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items() if not str(k).startswith("hydra/") and v is not None}


def _to_job(tree: Mapping[str, Any]) -> Job:
    return Job(**{item.name: _to_section(item.name, tree[item.name]) for item in dataclasses.fields(Job)})


def _to_section(name: str, value: Any) -> Any:
    make = next(item.default_factory for item in dataclasses.fields(Job) if item.name == name)
    kind = type(make()) if callable(make) else None
    return kind(**value) if kind is not None and dataclasses.is_dataclass(kind) else value


# --- files ------------------------------------------------------------------------------------------------------------


def _read_yaml(file: Path) -> Mapping[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping of keys to values.")
    return {str(key): value for key, value in content.items()}


def _read_stored(file: Path) -> Mapping[str, Any]:
    """Read a run's config.yaml, which may come from a stranger: only sections of the schema may stand in it."""
    content = dict(_read_yaml(file))
    for key in content:
        if key not in {item.name for item in dataclasses.fields(Job)}:
            raise ConfigError(f'{file}: there is no key "{key}" in a run\'s configuration.{keys.explain_unknown(key)}')
        if (key in keys.SECTIONS or key in OPEN_SECTIONS) and not isinstance(content[key], (dict, str)):
            raise ConfigError(f"{file}: {key} must be a mapping of keys to values, but is {content[key]!r}.")
    content.pop("verbose", None)  # that was for the command, not for the run
    if isinstance(content.get("run"), dict):
        content["run"] = {k: v for k, v in content["run"].items() if k not in ("name", "resume", "like")}
    return content


def _where_trusted(where: Sources, stored: Path | None) -> str:
    if stored is not None:
        return f"in {stored}"
    for directory in where.directories:
        for file in sorted(directory.rglob("*.yaml")):
            if "trust" in _read_yaml(file):
                return f"in {file}"
    return "by a file"
