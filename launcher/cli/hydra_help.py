"""What Hydra's own flags print: `--cfg`, `--info`, `--package`, `--resolve` and `--hydra-help`.

`hydra.main` would do the same, but would also apply what a configuration file sets under `hydra`: logging handlers,
callbacks, launchers. Here the configuration is composed and validated first, as for a run; Hydra only formats it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal import hydra as hydra_module
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from launcher import runs
from launcher.cli.line import Line
from launcher.cli.requests import request_of
from launcher.cli.verbs import VERBS
from launcher.config import Composition, hydra_for
from launcher.errors import ConfigError, did_you_mean
from launcher.jobs import prepare
from launcher.jobs.prepare import Request

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True)
class HydraFlags:
    """The values of Hydra's flags: --hydra-help, --cfg WHAT, --info WHAT, --package SECTION, --resolve."""

    hydra_help: bool = False
    cfg: str | None = None
    info: str | None = None
    package: str | None = None
    resolve: bool = False

    @classmethod
    def of(cls, line: Line) -> HydraFlags:
        """Read the flags of a command line.

        Raises:
            ConfigError: the verb composes no job, a value is unknown, or a flag lacks the flag that it modifies.
        """
        flags = line.flags
        if not VERBS[line.verb].composes:
            raise ConfigError(
                f"launch {line.verb} composes no job. Use --cfg, --info and --hydra-help with launch train."
            )
        for flag, known in (("cfg", CFG), ("info", INFO)):
            if (value := flags.get(flag)) is not None and value not in known:
                raise ConfigError(
                    f"--{flag} {value} is not one of {', '.join(known)}.{did_you_mean(value, known)}", key=f"--{flag}"
                )
        if flags.keys() & {"package", "resolve"} and "cfg" not in flags:
            raise ConfigError("--package and --resolve select what --cfg prints. Add --cfg job.")
        return cls("hydra_help" in flags, flags.get("cfg"), flags.get("info"), flags.get("package"), "resolve" in flags)


def show(line: Line) -> str:
    """Return what Hydra's flags of a command line print.

    Raises:
        ConfigError: the flags are invalid (see `HydraFlags.of`), or the configuration is.
    """
    asked = HydraFlags.of(line)
    request = request_of(line)
    if "multirun" in line.flags:
        from launcher.sweeps.specification import read_sweep  # imports Optuna

        composition = read_sweep(request).first
        request = replace(request, words=composition.words)
    elif line.name is None:
        composition = prepare.composed(request)
    else:
        run = runs.find(prepare.root_of(prepare.run_section(request).root), line.name)
        composition = prepare.over_the_run(request, run)[0]
    return _text(asked, composition, request)


def _text(asked: HydraFlags, composition: Composition, request: Request) -> str:
    if asked.cfg == "job":
        return _yaml(composition.tree(asked.resolve), asked.package)
    with hydra_for(_words_of(composition, request), request.config_dir) as (hydra, primary, overrides):
        if asked.hydra_help:
            composed = hydra.compose_config(None, [], RunMode.RUN)
            HydraConfig.instance().set_config(composed)
            shown = OmegaConf.create(hydra.get_sanitized_hydra_cfg(composed))
            text = hydra.get_help(composed.hydra.hydra_help, shown, get_args_parser(), resolve=False)
            return str(text).rstrip("\n") + "\n"
        return _by_hydra(asked, hydra, primary, overrides)


def _words_of(composition: Composition, request: Request) -> Sequence[str]:
    """Return the words for a composition without a run. Words that change a run may be invalid without it."""
    return request.words if list(composition.words) == list(request.words) else []


def _by_hydra(asked: HydraFlags, hydra: Any, primary: str, overrides: list[str]) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        if asked.cfg is not None:
            hydra.show_cfg(primary, overrides, asked.cfg, asked.package, asked.resolve)
        else:
            log = hydra_module.log
            try:
                hydra.show_info(asked.info, primary, overrides, RunMode.RUN)
            finally:
                hydra_module.log = log
    return written.getvalue()


def _yaml(tree: dict[str, Any], package: str | None) -> str:
    whole = OmegaConf.create(tree)
    if package in (None, "_global_"):
        return OmegaConf.to_yaml(whole)
    found: Any = tree
    for part in str(package).split("."):
        if not isinstance(found, dict) or part not in found:
            raise ConfigError(
                f"--package {package}: there is no such section.{did_you_mean(str(package), tree)}", key="--package"
            )
        found = found[part]
    if not isinstance(found, (dict, list)):
        return f"{found}\n"
    return f"# @package {package}\n{OmegaConf.to_yaml(OmegaConf.create(found))}"
