"""What Hydra shows of a configuration: `launch VERB --help`, `--cfg`, `--info` and their like.

`hydra.main` would do all of it, and act on what a configuration file says under `hydra`: logging handlers, callbacks,
launchers. Here the configuration is composed and judged first, as for a run, and Hydra only writes it down.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config import Composition, hydra_for, sources
from launcher.errors import ConfigError, did_you_mean
from launcher.jobs.prepare import Request

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True)
class Asked:
    """What Hydra's own flags ask for: --help, --hydra-help, --cfg WHAT, --info WHAT, --package P, --resolve."""

    help: bool = False
    hydra_help: bool = False
    cfg: str | None = None
    info: str | None = None
    package: str | None = None
    resolve: bool = False

    def __bool__(self) -> bool:
        return self != Asked()

    def check(self) -> None:
        """Raise ConfigError for flags that go with nothing, and for unknown things to show."""
        for flag, value, known in (("--cfg", self.cfg, CFG), ("--info", self.info, INFO)):
            if value is not None and value not in known:
                raise ConfigError(f"{flag} {value}: there are {', '.join(known)}.{did_you_mean(value, known)}")
        if (self.package or self.resolve) and not (self.cfg or self.help):
            raise ConfigError("--package and --resolve say how --cfg shows the configuration: add --cfg job.")


def text(asked: Asked, composition: Composition, request: Request) -> str:
    """Return what was asked for. `composition` is what a run would use; the rest is read from where it comes from."""
    asked.check()
    if asked.cfg == "job":
        return _yaml(composition.tree(asked.resolve), asked.package)
    with hydra_for(_words_of(composition, request), request.config_dir) as (hydra, primary, overrides):
        if asked.hydra_help:
            composed = _compose(hydra, None, [])
            return _fill(hydra, composed.hydra.hydra_help, hydra.get_sanitized_hydra_cfg(composed))
        if asked.help:
            # Hydra lists the options of its first directory alone, and a user's own comes before ours.
            groups = sources(request.config_dir).groups()
            listing = "".join(f"{group}: {', '.join(options)}\n" for group, options in groups.items())
            hydra.format_config_groups = lambda predicate, compact=True: listing
            return _fill(hydra, _compose(hydra, primary, overrides).hydra.help, composition.tree(asked.resolve))
        return _by_hydra(asked, hydra, primary, overrides)


def _words_of(composition: Composition, request: Request) -> Sequence[str]:
    """What stands over a run's own configuration need not make sense without it."""
    return request.words if list(composition.words) == list(request.words) else []


def _compose(hydra: Any, primary: str | None, overrides: list[str]) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    composed = hydra.compose_config(primary, overrides, RunMode.RUN)
    HydraConfig.instance().set_config(composed)
    return composed


def _fill(hydra: Any, template: Any, shown: Any) -> str:
    from hydra._internal.utils import get_args_parser
    from omegaconf import OmegaConf

    text = hydra.get_help(template, OmegaConf.create(shown), get_args_parser(), resolve=False)
    return str(text).rstrip("\n") + "\n"


def _by_hydra(asked: Asked, hydra: Any, primary: str, overrides: list[str]) -> str:
    from hydra._internal import hydra as internals
    from hydra.types import RunMode

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        if asked.cfg is not None:
            hydra.show_cfg(primary, overrides, asked.cfg, asked.package, asked.resolve)
        else:
            before = internals.log
            try:
                hydra.show_info(asked.info, primary, overrides, RunMode.RUN)
            finally:
                internals.log = before
    return written.getvalue()


def _yaml(tree: dict[str, Any], package: str | None) -> str:
    from omegaconf import OmegaConf

    whole = OmegaConf.create(tree)
    if package in (None, "_global_"):
        return OmegaConf.to_yaml(whole)
    found: Any = tree
    for part in str(package).split("."):
        if not isinstance(found, dict) or part not in found:
            raise ConfigError(f"--package {package}: there is no such section.{did_you_mean(str(package), tree)}")
        found = found[part]
    if not isinstance(found, (dict, list)):
        return f"{found}\n"
    return f"# @package {package}\n{OmegaConf.to_yaml(OmegaConf.create(found))}"
