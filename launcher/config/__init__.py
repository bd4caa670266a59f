"""Configuration: typed defaults, sources, validation of words and values, and composition.

composition   words -> a `Job` of dataclasses       schema      every key, its type and its default
search_path   the directories it is read from       own_hydra   Hydra, apart from the caller's
overrides, keys   overrides and key names, validated   checks   valid values
authority     what a file may not decide            settings    the user's own settings
limits, guarded_hydra   what a configuration from a stranger may cost
targets       which classes may be named, and how they are built
"""

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
