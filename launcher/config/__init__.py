"""Configuration: typed defaults, sources, validation of words and values, and composition.

composition   words -> a `Job` of dataclasses       schema      every key, its type and its default
search_path   the directories it is read from       own_hydra   Hydra, apart from the caller's
overrides, keys   overrides and key names, validated   checks   valid values
authority     keys that a file may not set          settings    the user's own settings
limits, guarded_hydra   restrictions for a configuration from an untrusted source
yaml_files    configuration files as plain data
targets       which classes may be named, and how they are built
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.config.checks import check_run_name, check_values
    from launcher.config.composition import Composition, compose, hydra_for, peek
    from launcher.config.schema import (
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
        default_run_name,
        parse_interval,
    )
    from launcher.config.search_path import CONF, Sources, sources
    from launcher.config.settings import Settings

__all__ = [
    "CONF",
    "CheckpointConfig",
    "ClusterConfig",
    "Composition",
    "Interval",
    "Job",
    "LoggingConfig",
    "RunConfig",
    "ScalingConfig",
    "Settings",
    "Sources",
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

# Module -> the names that the package exports from it. They are imported on use: composition imports Hydra, and tab
# completion needs the schema only.
_EXPORTS = {
    "checks": ("check_run_name", "check_values"),
    "composition": ("Composition", "compose", "hydra_for", "peek"),
    "search_path": ("CONF", "Sources", "sources"),
    "settings": ("Settings",),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"launcher.config.{_MODULES.get(name, 'schema')}"), name)
