"""The words of a command line: the verb, its name, the flags and the overrides."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.verbs import VERBS, table
from launcher.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from launcher.jobs.prepare import Request

USAGE = f"""\
launch [VERB [NAME]] [HYDRA OVERRIDES...] [HYDRA FLAGS]

{table()}

  launch experiment=mnist                        train real digits on two workers of this machine
  launch experiment=mnist scaling.workers=4      the same experiment on four
  launch -m optimizer.lr=1e-3,1e-2 model=mlp,convnet    a sweep: every combination
  launch run.name=NAME run.resume=true           continue where a run stopped
  launch VERB --help                             Hydra's help: every group, every key, every default
  launch --config-dir DIR ...                    your own models, data and experiments
"""

# Flag -> (its name here, takes a value).
_FLAGS = {
    "--config-dir": ("config_dir", True),
    "-cd": ("config_dir", True),
    "--port": ("port", True),
    "--open": ("open", False),
    "--host": ("host", True),
    "-m": ("multirun", False),
    "--multirun": ("multirun", False),
    "--json": ("json", False),
    "--no-follow": ("no_follow", False),
    "--region": ("region", True),
    "--offline": ("offline", False),
    "--forget": ("forget", False),
    "--force": ("force", False),
    "--save": ("save", False),
    "--help": ("help", False),
    "-h": ("help", False),
    "--version": ("version", False),
    # Hydra's own, which show something.
    "--hydra-help": ("hydra_help", False),
    "--cfg": ("cfg", True),
    "-c": ("cfg", True),
    "--info": ("info", True),
    "-i": ("info", True),
    "--package": ("package", True),
    "-p": ("package", True),
    "--resolve": ("resolve", False),
}
# Flags of some verbs alone, and those verbs.
_VERBS_OF: dict[str, list[str]] = {}
for _verb_of in VERBS.values():
    for _flag in _verb_of.flags:
        _VERBS_OF.setdefault(_flag, []).append(_verb_of.name)
_OPTIONAL = {"--info": "all", "-i": "all"}  # what a flag means without its value


@dataclass
class Line:
    """A command line, taken apart."""

    verb: str
    name: str | None
    words: list[str] = field(default_factory=list)
    input: str | None = None  # of predict
    flags: dict[str, str] = field(default_factory=dict)
    explicit: bool = True  # the verb was written, not understood
    started: float = field(default_factory=time.time)

    @property
    def verbose(self) -> bool:
        return any(word.lstrip("+") == "verbose=true" for word in self.words)

    @property
    def config_dir(self) -> Path | None:
        chosen = self.flags.get("config_dir") or os.environ.get("LAUNCH_CONFIG_DIR")
        return Path(chosen).expanduser().absolute() if chosen else None

    def request(self) -> Request:
        from launcher.cli.output import say
        from launcher.jobs import ranks
        from launcher.jobs.prepare import Request

        note = say if ranks.prints() else lambda text: None
        return Request(self.words, self.config_dir, started=self.started, note=note)


def parse(arguments: Sequence[str]) -> Line:
    """Take a command line apart.

    Raises:
        ConfigError: a word is neither a verb nor an override, or a flag is unknown or lacks its value.
    """
    rest = list(arguments)
    line = Line(_verb(rest) or "train", None, explicit=False)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in _FLAGS:
            _take_flag(line, flag, value if equals else None, rest)
        elif word.startswith("-"):
            hint = did_you_mean(word, _FLAGS)
            raise ConfigError(f'"{word}" is no flag of launch.{hint} `launch --help` lists what there is.')
        elif line.verb == "predict" and flag == "input" and value:
            line.input = value
        elif "=" in word or word.startswith("~"):
            line.words.append(word)
        elif word == line.verb and not line.explicit:
            line.explicit = True
        elif VERBS[line.verb].named is not None and line.name is None:
            line.name = word
        else:
            raise ConfigError(_neither(word, line))
    if VERBS[line.verb].named == "run" and line.name is None and "help" not in line.flags:
        wanted = f"launch {line.verb} NAME"
        raise ConfigError(f"launch {line.verb} needs the name of a run: {wanted}. `launch runs` lists them.")
    return line


def _verb(words: Sequence[str]) -> str | None:
    """Return the first word that stands for itself when it is a verb; flags and overrides may come before it."""
    is_value = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if is_value:
            is_value = False
        elif word.startswith("-"):
            is_value = not equals and _FLAGS.get(flag, ("", False))[1]
        elif not equals and not word.startswith("~"):
            return word if word in VERBS else None
    return None


def _take_flag(line: Line, flag: str, value: str | None, rest: list[str]) -> None:
    name, takes_value = _FLAGS[flag]
    if line.verb not in _VERBS_OF.get(name, (line.verb,)):
        raise ConfigError(f"{flag} belongs to launch {' and launch '.join(_VERBS_OF[name])}. Leave it out.")
    if not takes_value:
        if value is not None:
            raise ConfigError(f"{flag} takes no value.")
        line.flags[name] = "yes"
        return
    if value is None and rest and not rest[0].startswith("-") and not (flag in _OPTIONAL and "=" in rest[0]):
        value = rest.pop(0)
    value = value or _OPTIONAL.get(flag)
    if value is None:
        raise ConfigError(f"{flag} needs a value: {flag} {name.upper()}.")
    line.flags[name] = value


def _neither(word: str, line: Line) -> str:
    """Say what a word without `=` may have been meant to be."""
    from launcher.config import sources
    from launcher.config.overrides import not_an_override

    if VERBS[line.verb].named == "run":
        return f'launch {line.verb} takes one name; "{line.name}" is one, and "{word}" another.'
    near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.0)[0]
    groups = sources(line.config_dir).groups()
    hint = not_an_override(word, groups, "").partition("group=option.")[2]
    return (
        f'"{word}" is neither a verb nor an override such as trainer.epochs=3.{hint} The nearest verb is "{near}"; '
        "`launch --help` lists them."
    )
