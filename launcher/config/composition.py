"""Composition of a `Job` from `conf/`, a user's own directory and the words of the command line, with Hydra.

Few modules use Hydra and OmegaConf (`tests/test_imports.py` lists them). The package imports this one on use, so that
modules which only need a dataclass of the configuration do not import Hydra. Composition reads files and the
environment; it instantiates nothing, writes nothing, and does not change a Hydra that the caller uses. Hydra's own
logging configuration, callbacks and launchers have no effect in any file, and its sweeper is always launch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from launcher.config import authority, cluster_kinds, keys, limits, masking, resolvers, schema, targets
from launcher.config.checks import check_foreign_keys, check_values
from launcher.config.guarded_hydra import composed_files, without_environment
from launcher.config.overrides import ParsedOverrides, masked, not_an_override, parse_overrides
from launcher.config.own_hydra import (
    PRIMARY,
    SCHEMA,
    compose_with_hydra,
    decided_node,
    initialize,
    job_node,
    own_hydra,
    primary_node,
    stored_node,
    wrong_type,
)
from launcher.config.schema import Job
from launcher.config.search_path import Sources, sources
from launcher.config.settings import Settings, settings_file, user_settings
from launcher.config.yaml_files import read_first, read_stored, where_trusted
from launcher.errors import ConfigError, TrustError

# The `_target_`s that a hydra section may name. Only the sweeper is ever built, for `-m` (`launcher.sweeps.plugin`).
_HYDRA_TARGETS = frozenset(
    ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", "hydra_plugins.launch_sweeper.LaunchSweeper")
)


@dataclass(frozen=True)
class Composition:
    """The result of `compose`.

    job: complete, typed, interpolations resolved. words: as given. choices: configuration group -> chosen option.
    given: dotted keys and groups in the words, without prefixes such as `+`. sweeper: `hydra.sweeper`, validated; its
    `params` are the sweeps of files. dropped: the keys of a stored configuration that it may not set, with values.
    """

    job: Job
    words: list[str]
    choices: dict[str, Any]
    given: frozenset[str]
    unresolved: dict[str, Any] = field(repr=False)
    sweeper: dict[str, Any] = field(default_factory=dict, repr=False)
    dropped: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_yaml(self, run_name: str | None = None) -> str:
        """Return the configuration as YAML for the run's directory, to be read again through `stored`.

        run_name: the final name of the run.
        """
        tree = self.tree()
        if run_name is not None:
            tree["run"] = {**tree["run"], "name": run_name}
        return OmegaConf.to_yaml(OmegaConf.create(tree))

    def tree(self, resolved: bool = False) -> dict[str, Any]:
        """Return the configuration as plain data that may be shown and stored.

        Literal secrets are ***, and `trust` is left out, since only a command line can give it. resolved: with the
        values of interpolations instead of as they were written.
        """
        tree = dataclasses.asdict(self.job) if resolved else self.unresolved
        masked = masking.mask({key: value for key, value in tree.items() if key != "trust"})
        assert isinstance(masked, dict)
        return masked

    def masked_words(self) -> list[str]:
        """Return the words with literal secrets as ***, for `overrides.yaml` and for the terminal."""
        return [masked(word) for word in self.words]


def compose(
    words: Sequence[str],
    config_dir: Path | None = None,
    stored: Path | None = None,
    *,
    cluster: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    own: Collection[str] | None = None,
) -> Composition:
    """Compose a job from the words of the command line; nothing is imported, instantiated or written.

    config_dir: a user's own groups, which win over ours of the same name. stored: a run's `config.yaml`, used in place
    of the groups; a group's word (`data=other`) then replaces the stored section as a whole, and the stored `run.name`,
    `run.resume` and `run.like`, which belong to the command and not to the job, are dropped.

    cluster: the section `cluster` that the user's own record has for the stored run; it replaces the stored one, of
    which nothing is used that a file may not decide (`launcher.config.authority`). settings: in place of the user's own
    settings. own: the words that the user typed, where others come from a recorded sweep.

    Raises ConfigError for what cannot be understood or breaks a rule, TrustError for a `_target_` outside the
    allow-list, and for keys that a file may not set.
    """
    where, settings = sources(config_dir), user_settings() if settings is None else settings
    plan = _parse_words(words, where, stored is not None, own)
    dropped: dict[str, Any] = {}
    if stored is None:
        node, decided = primary_node(where, settings), decided_node(settings, None)
    else:
        content, dropped = authority.without_claims(read_stored(Path(stored)), cluster or {})
        dropped = _not_replaced(dropped, plan)
        node = stored_node(content, plan.groups)
        decided = decided_node(settings, {} if "cluster" in plan.groups else cluster or {})
    with own_hydra():
        composed, tree, unresolved = _compose_validated(plan, where, node, decided, settings, stored)
        hydra_tree = _hydra_node(composed)
        choices = _choices(composed, plan, node)
    if tree.get("trust"):
        raise TrustError(
            f"trust is set to {tree['trust']} {where_trusted(where, stored)}. A configuration cannot vouch for "
            "itself: give it on the command line, trust=[PACKAGE], if you know and trust that code."
        )
    unresolved = resolvers.with_values(unresolved, tree)
    tree["trust"] = unresolved["trust"] = list(plan.trust)
    for part in (tree, unresolved):
        _drop_if_taken(part, plan.given)
    for section, target in targets.find_targets(hydra_tree, "hydra"):
        if target not in _HYDRA_TARGETS:
            raise TrustError(f"{section}._target_ is {target!r}, but launch runs nothing that a hydra section names.")
    targets.check(tree, plan.trust)
    masked = masking.find_masked({key: value for key, value in tree.items() if key != "vars"}, unresolved)
    if masked:
        names = masking.find_masked(unresolved) or masked
        raise ConfigError(
            f"{', '.join(names)}: the value was a secret, which is never written to config.yaml. Give it again on the "
            f"command line, {names[0]}=..., or refer to an environment variable, ${{oc.env:NAME}}.",
            key=names[0],
        )
    masking.remember(masking.secrets_in(tree))
    check_foreign_keys(tree["cluster"])
    _drop_foreign_keys(unresolved, tree["cluster"])
    job = Job.from_dict(tree)
    check_values(job)
    return Composition(job, list(words), choices, plan.given, unresolved, hydra_tree["sweeper"], dropped)


def peek(words: Sequence[str], config_dir: Path | None, section: str) -> Any:
    """Return one section of what the words compose to (`run`: a RunConfig), where the rest may still lack values.

    Used before it is known to which configuration the words apply. Raises ConfigError.
    """
    where, settings = sources(config_dir), user_settings()
    plan, node = _parse_words(words, where, of_a_run=False), primary_node(where, settings)
    with own_hydra():
        _, tree, _ = _compose_validated(plan, where, node, decided_node(settings, None), settings, None, section)
    return schema.section(section, tree[section])


@contextmanager
def hydra_for(words: Sequence[str], config_dir: Path | None = None) -> Iterator[tuple[Any, str, list[str]]]:
    """Yield (Hydra's `Hydra` object, name of the primary configuration, overrides), for output that Hydra formats."""
    where, settings = sources(config_dir), user_settings()
    with own_hydra():
        plan = _parse_words(words, where, of_a_run=False)
        overrides = initialize(plan.overrides, where, primary_node(where, settings), settings)
        yield GlobalHydra.instance().hydra, PRIMARY, overrides


def _drop_if_taken(tree: Mapping[str, Any], given: frozenset[str]) -> None:
    """Drop an overlay's `_if_taken_` values for keys that the command line sets."""
    for key in given:
        section, _, name = key.partition(".")
        holder = tree.get(section)
        optional = holder.get(targets.IF_TAKEN) if isinstance(holder, dict) else None
        if isinstance(optional, dict):
            optional.pop(name, None)


def _drop_foreign_keys(unresolved: dict[str, Any], cluster: Mapping[str, Any]) -> None:
    """Drop the keys of other kinds of clusters that are at their defaults: a run's config.yaml need not list them."""
    holder = unresolved["cluster"]
    if isinstance(holder, Mapping):
        foreign = schema.foreign_keys(cluster)
        unresolved["cluster"] = {key: value for key, value in holder.items() if foreign.get(key, True)}


# --- the words of the command line ------------------------------------------------------------------------------------


def _parse_words(
    words: Sequence[str], where: Sources, of_a_run: bool, own: Collection[str] | None = None
) -> ParsedOverrides:
    parser = OverridesParser.create()
    groups = where.groups()
    parsed = []
    for word in words:
        limits.check_word(word)
        try:
            parsed.append((word, parser.parse_override(word)))
        except HydraException as error:
            raise ConfigError(
                not_an_override(word, groups, str(error).splitlines()[0]), key=masked(word.partition("=")[0])
            ) from None
    found = parse_overrides(parsed, groups, None if of_a_run else _listed_groups(where), own)
    kinds = [
        _kind_of_option(override.value(), where) for _, override in parsed if override.get_key_element() == "cluster"
    ]
    # An overlay may set `cluster.kind` after the option; the word of the user takes precedence.
    return replace(found, overrides=[*(f"++cluster.kind={kind}" for kind in kinds if kind), *found.overrides])


def _kind_of_option(option: Any, where: Sources) -> str | None:
    """Return the kind that an option of the group `cluster` chooses."""
    if cluster_kinds.find(str(option)) is not None:
        return str(option)
    content = read_first(where, f"cluster/{option}.yaml") if isinstance(option, str) else None
    return (
        kind if content is not None and isinstance(kind := content.get("kind"), str) and kind.isidentifier() else None
    )


def _listed_groups(where: Sources) -> frozenset[str]:
    """Return the groups in the defaults list of the primary config.yaml."""
    content = read_first(where, "config.yaml") or {}
    found = set()
    for item in content.get("defaults") or []:
        for name in item if isinstance(item, Mapping) else []:
            group = str(name).removeprefix("optional ").removeprefix("override ").partition("@")[0]
            found.add(group.strip().lstrip("/"))
    return frozenset(found)


# --- keys that a file may not set ------------------------------------------------------------------------------------


def _compose_validated(
    plan: ParsedOverrides,
    where: Sources,
    node: Mapping[str, Any],
    decided: Mapping[str, Any],
    settings: Settings,
    stored: Path | None,
    only: str | None = None,
) -> tuple[DictConfig, dict[str, Any], dict[str, Any]]:
    """Compose within `own_hydra`; returns the values of `_resolve` after the composed node.

    node: the primary configuration. decided: a primary configuration with only the settings that the user made.
    Raises TrustError for keys that a file may not set.
    """
    composed = compose_with_hydra(plan.overrides, where, node, settings)
    if composed["hydra"]["job"]["env_copy"]:
        raise ConfigError(
            "hydra.job.env_copy copies variables of the environment; launch does not use it. Remove it.",
            key="hydra.job.env_copy",
        )
    if stored is None:
        resolvers.import_for(OmegaConf.to_container(composed, resolve=False), plan.trust)
    tree, unresolved = _resolve(composed, only)
    found = _without_authority(
        composed, tree, unresolved, lambda: compose_with_hydra(plan.decided, where, decided, settings)
    )
    if found:
        raise TrustError(_refusal(found, initialize(plan.overrides, where, node, settings), where, stored))
    return composed, tree, unresolved


def _not_replaced(dropped: Mapping[str, Any], plan: ParsedOverrides) -> dict[str, Any]:
    """Return the dropped keys that no word replaces."""
    replaced = {*plan.given, *(["trust"] if plan.trust else [])}
    return {
        key: value for key, value in dropped.items() if key not in replaced and key.partition(".")[0] not in plan.groups
    }


def _without_authority(
    composed: DictConfig, tree: Mapping[str, Any], unresolved: Mapping[str, Any], decide: Callable[[], DictConfig]
) -> dict[str, Any]:
    """Return the keys, as they were written, whose values need the user's authority and do not have it.

    decide: composes only the settings that the user made.
    """
    run = tree.get("run", {})
    claimed = authority.claims(tree.get("cluster"), run.get("root"))
    written = unresolved["run"] if isinstance(unresolved["run"], Mapping) else dict.fromkeys(run, unresolved["run"])
    referring = [key for key in run if isinstance(written[key], str) and "${" in written[key]]
    if not claimed and not referring:
        return {}
    trusted = _trusted(decide, [*claimed, *(f"run.{key}" for key in referring)])
    found = {key for key, value in claimed.items() if key not in trusted or trusted[key] != value}
    from_files = [key for key in referring if trusted.get(f"run.{key}", _MISSING) != run[key]]
    if from_files:
        found.update(f"run.{key}" for key in _read_from_environment(composed, from_files))
    return {key: _written(unresolved, key) for key in sorted(found, key=lambda key: (key != "cluster.kind", key))}


_MISSING = object()


def _trusted(decide: Callable[[], DictConfig], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the values of keys that follow from the user's own settings alone."""
    try:
        typed = _typed(decide())
    except (ConfigError, OmegaConfBaseException):
        return {}
    found = {}
    for key in wanted:
        section, _, name = key.partition(".")
        try:
            value = typed[section][name]
            found[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:  # it depends on a setting of a file
            continue
    return found


def _read_from_environment(composed: DictConfig, names: Sequence[str]) -> list[str]:
    """Return which keys of the section `run` depend on variables of the environment."""
    typed, found = _typed(composed), []
    for name in names:
        with without_environment() as asked, suppress(OmegaConfBaseException):
            _ = typed["run"][name]
        if asked:
            found.append(name)
    return found


def _written(unresolved: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    holder = unresolved[section]
    return holder[name] if isinstance(holder, Mapping) else holder


def _refusal(found: Mapping[str, Any], overrides: list[str], where: Sources, stored: Path | None) -> str:
    files = composed_files(overrides, PRIMARY, SCHEMA)
    return authority.refusal(found, files, PRIMARY, str(stored or where.directories[0]), str(settings_file()))


# --- from OmegaConf to plain data ------------------------------------------------------------------------------------


def _resolve(composed: DictConfig, only: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration as plain data, with interpolations resolved and as they were written.

    only: the one section whose interpolations are resolved.
    """
    try:
        typed = _typed(composed)
        unresolved = OmegaConf.to_container(typed, resolve=False)
        tree = {}
        for name in [only] if only else [item.name for item in dataclasses.fields(Job)]:
            value = typed[name]
            is_node = OmegaConf.is_config(value)
            tree[name] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_node else value
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key} has no value yet (???). Give it: {error.full_key}=...", key=error.full_key or ""
        ) from error
    except InterpolationResolutionError as error:
        reason = " ".join(str(error).splitlines()[0].split())
        if "Environment variable" in reason:
            variable = reason.partition("Environment variable '")[2].partition("'")[0]
            raise ConfigError(
                f"{error.full_key} needs the environment variable {variable}, which is not set: set it, "
                "or give the key a value.",
                key=error.full_key or "",
            ) from error
        raise ConfigError(f"{error.full_key} cannot be interpolated: {reason}.", key=error.full_key or "") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        if key and not keys.is_known(key):
            raise ConfigError(f'There is no key "{key}".{keys.explain_unknown(key)}', key=key) from error
        raise ConfigError(wrong_type(key, error) if key else " ".join(str(error).split()), key=key) from error
    assert isinstance(unresolved, dict)
    return tree, {str(key): value for key, value in unresolved.items() if key != "hydra"}


def _typed(composed: DictConfig) -> DictConfig:
    HydraConfig.instance().set_config(composed)  # for ${hydra:runtime.cwd}
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    # Typed once more: a config.yaml of the user's own may have left out the schema.
    typed = OmegaConf.merge(job_node(), own)
    assert isinstance(typed, DictConfig)
    OmegaConf.set_struct(typed, False)
    typed["hydra"] = composed["hydra"]
    return typed


def _hydra_node(composed: DictConfig) -> Any:
    return OmegaConf.to_container(composed["hydra"], resolve=False)


def _choices(composed: DictConfig, plan: ParsedOverrides, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return group -> chosen option, or a list of options, which Hydra itself does not record."""
    found = OmegaConf.to_container(composed["hydra"]["runtime"]["choices"])
    assert isinstance(found, dict)
    defaults = [item for item in node.get("defaults") or [] if isinstance(item, Mapping)]
    lists = {group: option for item in [*defaults, plan.options] for group, option in item.items()}
    found |= {group: option for group, option in lists.items() if isinstance(option, list)}
    return {str(k): v for k, v in found.items() if not str(k).startswith("hydra/") and v is not None}
