"""Tab completion: verbs, flags, names of runs, configuration groups, options and keys.

`launch --install-completion SHELL` installs a script for the shell, which calls `launch --complete` at each Tab. That
command must respond within 150 ms, so it imports neither Hydra nor the clusters, and reads no YAML but the option files
of the section that is being completed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from launcher.cli.verbs import FLAGS, VERBS
from launcher.config import schema
from launcher.config.search_path import CONF
from launcher.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
_KEY = re.compile(r"^([A-Za-z_]\w*)\s*:", re.MULTILINE)

# COMP_WORDBREAKS contains "=" and ":", so bash passes `model=ml` as three words; only the text after the last break may
# be replied.
_BASH = """\
_launch() {
  local line="${COMP_LINE:0:COMP_POINT}" word reply
  word="${line##*[[:space:]]}"
  mapfile -t reply < <(launch --complete "$line" 2>/dev/null)
  local cut="${word%"${word##*[=:]}"}"
  [[ "$COMP_WORDBREAKS" == *=* ]] || cut=""
  COMPREPLY=("${reply[@]#"$cut"}")
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _launch launch
"""
_ZSH = """\
#compdef launch
_launch() {
  local -a full partial
  local each
  for each in ${(f)"$(launch --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)"}; do
    if [[ $each == *[=.] ]]; then partial+=($each); else full+=($each); fi
  done
  compadd -Q -S '' -a partial
  compadd -Q -a full
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _launch "$@"; else
  (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u; }
  compdef _launch launch
fi
"""
_FISH = """\
complete -c launch -f -a '(launch --complete (commandline -cp) 2>/dev/null)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def install(shell: str) -> str:
    """Install the completion script of a shell for this user, and return what to do next.

    fish loads the script by itself; for bash and zsh a line is added to the start-up file of the shell. Idempotent.

    Raises:
        ConfigError: the shell is unknown.
    """
    if shell not in SHELLS:
        raise ConfigError(
            f"--install-completion {shell}: completion exists for {', '.join(SHELLS)}.", key="--install-completion"
        )
    home = Path.home()
    if shell == "fish":
        script = _directory("XDG_CONFIG_HOME", home / ".config") / "fish/completions/launch.fish"
    else:
        script = _directory("XDG_DATA_HOME", home / ".local/share") / f"launch/completion.{shell}"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(_SCRIPTS[shell])
    if shell == "fish":
        return f"Completion is installed: {script}. It works in each new fish."
    start = home / ".bashrc" if shell == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    line = f'[ -r "{script}" ] && source "{script}"  # completion of launch\n'
    present = start.read_text() if start.exists() else ""
    if str(script) not in present:
        with start.open("a") as file:
            file.write(line if not present or present.endswith("\n") else f"\n{line}")
    return f"Completion is installed: {script}, which {start} loads. It works in each new {shell}."


def complete(line: str) -> list[str]:
    """Return the completions of the last word of a command line.

    Args:
        line: the line up to the cursor, beginning with `launch`.
    """
    *before, word = re.split(r"\s+", line.lstrip())
    before = before[1:]
    verb = next((each for each in before if each in VERBS), None)
    found = _flag_value(before, word)
    if found is None:
        found = _words(before, verb, word)
    return sorted({each for each in found if each.startswith(word)})


def _flag_value(before: Sequence[str], word: str) -> Iterable[str] | None:
    """Return the values of the flag before the word, or None if there is none with a value."""
    last = before[-1] if before else ""
    if last == "--install-completion":
        return SHELLS
    flag = next((flag for flag in FLAGS if last in flag.spellings and flag.value is not None), None)
    if flag is None:
        return None
    if flag.name == "config_dir":
        return _directories(word)
    return {"cfg": ("job", "hydra", "all"), "info": ("all", "config", "defaults", "searchpath")}.get(flag.name, ())


def _words(before: Sequence[str], verb: str | None, word: str) -> Iterator[str]:
    chosen = VERBS[verb or "train"]
    if word.startswith("-"):
        yield from (flag.spellings[0] for flag in FLAGS if chosen.accepts(flag))
        if verb is None:
            yield "--install-completion"
        return
    key, equals, value = word.partition("=")
    directories = _sources(before)
    if equals:
        yield from (f"{key}={option}" for option in _values(key.lstrip("+"), value, directories))
        return
    if verb is None and not word.startswith(("+", "~")):
        yield from VERBS
    named = [each for each in before if each != verb and not each.startswith("-") and "=" not in each]
    if len(named) < {"run": 1, "runs": 2}.get(chosen.named or "", 0):
        yield from _runs(before)
    if chosen.named == "key":
        yield from (*VERBS, *_keys(word, directories))
    elif chosen.composes:
        prefix = word[: len(word) - len(word.lstrip("+~"))]
        bare = word[len(prefix) :]
        yield from (f"{prefix}{group}=" for group in _groups(directories))
        yield from (f"{prefix}{each}{'' if each.endswith('.') else '='}" for each in _keys(bare, directories))


def _values(key: str, value: str, directories: Sequence[Path]) -> Iterator[str]:
    """Yield the values of a key or a group. After a comma, of a sweep or of a list, the next one is completed."""
    before, comma, _ = value.rpartition(",")
    if not comma and value.startswith("["):
        before, comma = "", "["
    options = {file.stem for directory in directories for file in (directory / key).glob("*.yaml")}
    section, _, name = key.partition(".")
    kind = get_type_hints(schema.Job).get(section)
    if not options and name and is_dataclass(kind) and get_type_hints(kind).get(name) is bool:
        options = {"true", "false"}
    yield from (f"{before}{comma}{option}" for option in options)


def _keys(word: str, directories: Sequence[Path]) -> Iterator[str]:
    """Yield the sections, or the keys of the section that a word names."""
    section, dot, _ = word.partition(".")
    hints = get_type_hints(schema.Job)
    if not dot:
        yield from (
            f"{name}." if is_dataclass(kind) or name in schema.OPEN_SECTIONS else name for name, kind in hints.items()
        )
    elif section == "cluster":
        yield from (f"cluster.{field.name}" for field in fields(schema.cluster_schema()))
    elif is_dataclass(kind := hints.get(section)):
        yield from (f"{section}.{field.name}" for field in fields(kind))
    elif section in schema.OPEN_SECTIONS:
        for directory in directories:
            for file in (directory / section).glob("*.yaml"):
                names = _KEY.findall(file.read_text(errors="replace"))
                yield from (f"{section}.{name}" for name in names if not name.startswith("_") and name != "defaults")


def _groups(directories: Sequence[Path]) -> set[str]:
    return {
        entry.name
        for directory in directories
        for entry in os.scandir(directory)
        if entry.is_dir() and not entry.name.startswith((".", "_"))
    }


def _sources(before: Sequence[str]) -> list[Path]:
    """Return the configuration directories: of the flag, else of the environment, and ours."""
    given = [value for flag, value in pairwise(before) if flag in ("--config-dir", "-cd")]
    given += [word.partition("=")[2] for word in before if word.startswith(("--config-dir=", "-cd="))]
    own = given[-1] if given else os.environ.get("LAUNCH_CONFIG_DIR")
    return [path for path in ([Path(own).expanduser()] if own else []) + [CONF] if path.is_dir()]


def _runs(before: Sequence[str]) -> Iterator[str]:
    """Yield the names of the runs in the run root, and of the trials of sweeps."""
    roots = [word.partition("=")[2] for word in before if word.startswith("run.root=")]
    root = Path(roots[-1] if roots else "runs").expanduser()
    if not root.is_dir():
        return
    for entry in os.scandir(root):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry.name
            if os.path.exists(f"{entry.path}/study.journal"):
                yield f"{entry.name}/best"


def _directories(word: str) -> Iterator[str]:
    parent, slash, _ = word.rpartition("/")
    with os.scandir(Path(parent + slash or ".").expanduser()) as entries:
        yield from (f"{parent}{slash}{entry.name}" for entry in entries if entry.is_dir() and entry.name[0] != ".")


def _directory(variable: str, default: Path) -> Path:
    given = os.environ.get(variable)
    return Path(given) if given and Path(given).is_absolute() else default
