"""Parses a command line into a verb, its name, flags and overrides."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cli.verbs import FLAGS, VERBS, Flag
from launcher.config.overrides import not_an_override
from launcher.config.search_path import sources
from launcher.errors import ConfigError, did_you_mean

_SPELLINGS: dict[str, Flag] = {spelling: flag for flag in FLAGS for spelling in flag.spellings}
_PRIMARY = "the primary configuration is config.yaml; choose a job with experiment=NAME"
_DIRECTORY = "--config-dir DIR adds a directory of your own, and its files take precedence"
# Flag of Hydra -> what to use instead.
_INSTEAD = {
    **dict.fromkeys(("-cn", "--config-name"), _PRIMARY),
    **dict.fromkeys(("-cp", "--config-path"), _DIRECTORY),
    **dict.fromkeys(("-r", "--run"), "launch runs the job without a flag, and a sweep with -m"),
    **dict.fromkeys(("-sc", "--shell-completion"), "launch --install-completion bash, zsh or fish installs completion"),
    "--experimental-rerun": "launch run.like=NAME starts a run with the configuration of another run",
}


@dataclass
class Line:
    """A parsed command line.

    Attributes:
        verb: the name of the verb; `train` if none was given.
        name: the run, the cluster or the key that the verb applies to.
        other: the second run, of `launch diff` only.
        words: the overrides, in order.
        input: the path after `input=`, of `launch predict` only.
        rows: the path after `rows=`, of `launch evaluate` only.
        flags: the name of each flag -> its value, "yes" for a switch.
        explicit: whether the command line contains the verb.
        started: wall-clock time of the command.
    """

    verb: str
    name: str | None
    words: list[str] = field(default_factory=list)
    input: str | None = None
    rows: str | None = None
    other: str | None = None
    flags: dict[str, str] = field(default_factory=dict)
    explicit: bool = True
    started: float = field(default_factory=time.time)

    @property
    def verbose(self) -> bool:
        return is_verbose(self.words)

    @property
    def config_dir(self) -> Path | None:
        """Return the user's own configuration directory: of the flag, else of the environment."""
        chosen = self.flags.get("config_dir") or os.environ.get("LAUNCH_CONFIG_DIR")
        return Path(chosen).expanduser().absolute() if chosen else None


def is_verbose(words: Sequence[str]) -> bool:
    """Return whether the words contain `verbose=true`."""
    return any(word.lstrip("+") == "verbose=true" for word in words)


def parse(arguments: Sequence[str]) -> Line:
    """Parse the arguments of `launch`.

    Raises:
        ConfigError: a word is neither a verb nor an override, or a flag is unknown or lacks its value.
    """
    rest = list(arguments)
    line = Line(_find_verb(rest) or "train", None, explicit=False)
    while rest:
        word = rest.pop(0)
        spelling, equals, value = word.partition("=")
        if spelling in _SPELLINGS:
            _read_flag(line, spelling, value if equals else None, rest)
        elif word.startswith("-"):
            if spelling in _INSTEAD:
                raise ConfigError(
                    f"{spelling} is a flag of Hydra that launch does not have: {_INSTEAD[spelling]}.", key=spelling
                )
            hint = did_you_mean(word, _SPELLINGS)
            raise ConfigError(
                f'"{word}" is not a flag of launch.{hint} `launch {line.verb} --help` lists the flags.', key=spelling
            )
        elif line.verb == "predict" and spelling == "input" and value:
            line.input = value
        elif line.verb == "evaluate" and spelling == "rows" and value:
            line.rows = value
        elif "=" in word or word.startswith("~"):
            line.words.append(word)
        elif word == line.verb and not line.explicit:
            line.explicit = True
        elif VERBS[line.verb].named is not None and line.name is None:
            line.name = word
        elif VERBS[line.verb].named == "runs" and line.other is None:
            line.other = word
        else:
            raise ConfigError(_explain_word(word, line), key=word)
    if VERBS[line.verb].named == "runs" and line.other is None and "help" not in line.flags:
        raise ConfigError(
            f"launch {line.verb} needs the names of two runs: launch {line.verb} A B. `launch runs` lists the runs."
        )
    if VERBS[line.verb].named == "run" and line.name is None and "help" not in line.flags:
        raise ConfigError(
            f"launch {line.verb} needs the name of a run: launch {line.verb} NAME. `launch runs` lists the runs."
        )
    return line


def _find_verb(words: Sequence[str]) -> str | None:
    """Return the first word that is neither a flag nor an override, if it is a verb."""
    is_value = False
    for word in words:
        spelling, equals, _ = word.partition("=")
        if is_value:
            is_value = False
        elif word.startswith("-"):
            flag = _SPELLINGS.get(spelling)
            is_value = not equals and flag is not None and flag.value is not None
        elif not equals and not word.startswith("~"):
            return word if word in VERBS else None
    return None


def _read_flag(line: Line, spelling: str, value: str | None, rest: list[str]) -> None:
    flag = _SPELLINGS[spelling]
    verbs = [verb.name for verb in VERBS.values() if flag.name in verb.flags]
    if verbs and line.verb not in verbs:
        raise ConfigError(f"{spelling} belongs to launch {' and launch '.join(verbs)}. Leave it out.", key=spelling)
    if flag.value is None:
        if value is not None:
            raise ConfigError(f"{spelling} takes no value.", key=spelling)
        line.flags[flag.name] = "yes"
        return
    has_default = flag.default is not None
    if value is None and rest and not rest[0].startswith("-") and not (has_default and "=" in rest[0]):
        value = rest.pop(0)
    value = value or flag.default
    if value is None:
        raise ConfigError(f"{spelling} needs a value: {spelling} {flag.value}.", key=spelling)
    if line.flags.get(flag.name, value) != value:
        raise ConfigError(
            f"{spelling} is given twice, with {line.flags[flag.name]} and {value}. Choose one.", key=spelling
        )
    line.flags[flag.name] = value


def _explain_word(word: str, line: Line) -> str:
    """Return the error for a word that is neither a verb nor an override."""
    if VERBS[line.verb].named == "runs":
        return f'launch {line.verb} takes two names, but found a third: "{word}".'
    if VERBS[line.verb].named == "run":
        return f'launch {line.verb} takes one name, but found two: "{line.name}" and "{word}".'
    nearest = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.0)[0]
    groups = sources(line.config_dir).groups()
    hint = not_an_override(word, groups, "").partition("group=option.")[2]
    return (
        f'"{word}" is neither a verb nor an override such as trainer.epochs=3.{hint} The nearest verb is "{nearest}"; '
        "`launch --help` lists the verbs."
    )
