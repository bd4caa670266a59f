"""The user's own settings, $XDG_CONFIG_HOME/launch/default.yaml (~/.config): cluster and run root of all runs.

    cluster:                       # of every run, unless a word or a configuration chooses local or none
      kind: ssh
      hosts: [ada@vm1, ada@vm2]
    run:
      root: abfss://runs@ada.dfs.core.windows.net/all

It is the one file whose choice of a cluster counts without a word of the command line, so it holds nothing else.
Without `kind`, the keys of `cluster` are defaults for whichever kind a word chooses. `cluster: NAME` chooses an option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.authority import guarded
from launcher.config.cluster_kinds import may_be_chosen_by_a_file
from launcher.config.yaml_files import read_yaml
from launcher.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """choice: the option of the group `cluster` to use by default, or None. cluster: keys for it. root: `run.root`."""

    choice: str | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None

    @classmethod
    def decided(cls, cluster: Mapping[str, Any]) -> Settings:
        """Return the cluster of the user's settings: a complete section `cluster`, or an empty one."""
        keys = {key: value for key, value in cluster.items() if key != "kind"}
        return cls(cluster.get("kind"), keys) if cluster else cls()

    @property
    def section(self) -> dict[str, Any]:
        """Return the section `cluster` of `decided` settings."""
        return {"kind": self.choice, **self.cluster} if self.choice is not None else {}

    def keys_for(self, option: str) -> dict[str, Any]:
        """Return the keys to be added to the option file of a shipped kind."""
        if self.choice is not None:
            return dict(self.cluster) if option == self.choice else {}
        free = may_be_chosen_by_a_file(option)
        return {key: value for key, value in self.cluster.items() if not (free and key in guarded())}


def settings_file() -> Path:
    """Return the path of the user's own settings, which may not exist."""
    given = os.environ.get("XDG_CONFIG_HOME")
    base = Path(given) if given and Path(given).is_absolute() else Path("~/.config").expanduser()
    return base / "launch" / "default.yaml"


def user_settings() -> Settings:
    """Read the user's own settings. ConfigError if they are not valid."""
    file = settings_file()
    try:
        if not file.is_file():
            return Settings()
    except OSError:
        return Settings()
    content = read_yaml(file)
    cluster, run = content.get("cluster") or {}, content.get("run") or {}
    unknown = [key for key in content if key not in ("cluster", "run")]
    unknown += [f"run.{key}" for key in run if key != "root"] if isinstance(run, Mapping) else ["run"]
    if unknown:
        raise ConfigError(
            f"{file} sets {', '.join(unknown)}, but it may contain only `cluster` and `run.root`. Put "
            "settings of a job into an experiment, or into local/default.yaml of a --config-dir.",
            key=unknown[0],
        )
    root = run.get("root")
    if isinstance(cluster, str):
        return Settings(cluster, {}, root)
    if not isinstance(cluster, Mapping) or not isinstance(cluster.get("kind", ""), str):
        raise ConfigError(
            f"{file}: cluster must be a mapping of keys to values, or the name of an option.", key="cluster"
        )
    return Settings(cluster.get("kind"), {key: value for key, value in cluster.items() if key != "kind"}, root)
