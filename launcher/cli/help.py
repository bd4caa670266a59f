"""Help in the terminal: `launch --help`, `launch VERB --help` and `launch help`. One screen each, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from launcher.cli.line import Line
from launcher.cli.verbs import FLAGS, VERBS, Flag, Verb
from launcher.config.key_help import text
from launcher.config.search_path import Sources, sources

WIDTH = 80


def overview() -> str:
    """Return the text of `launch --help`: every verb with its summary, and examples."""
    verbs = "\n".join(f"  {verb.usage:<16} {verb.summary}" for verb in VERBS.values())
    return f"""\
launch [VERB [NAME]] [KEY=VALUE ...] [FLAGS]

{verbs}

  launch experiment=mnist scaling.workers=4    train on four workers
  launch -m optimizer.lr=1e-3,1e-2             run a sweep over the values
  launch run.name=NAME run.resume=true         continue a run that stopped
  launch --config-dir DIR experiment=MINE      train your own model and data
launch VERB --help lists flags and groups; launch help KEY explains a key.
"""


def about_verb(verb: Verb, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `launch VERB --help`: usage, flags and, for a verb that composes a job, the groups."""
    lines = [f"launch {verb.usage}{' [KEY=VALUE ...]' * verb.composes} [FLAGS]", f"  {_sentence(verb.summary)}"]
    lines += [f"  {verb.details}"] if verb.details else []
    if verb.composes:
        lines += ["", "Groups, chosen with GROUP=OPTION:"]
        width = max(map(len, groups), default=0)
        lines += [_fit(f"  {group:<{width}}  ", options) for group, options in groups.items()]
    own = [flag for flag in FLAGS if flag.name in verb.flags]
    others = [flag.usage for flag in FLAGS if verb.accepts(flag) and flag not in own]
    width = max((len(_both(flag)) for flag in own), default=0)
    lines += ["", *(f"  {_both(flag):<{width}}  {flag.meaning}" for flag in own)] if own else [""]
    lines += textwrap.wrap(
        f"{'Other flags' if own else 'Flags'}: {', '.join(others)}", WIDTH - 1, subsequent_indent="  "
    )
    if verb.composes:
        lines.append("launch --cfg job prints all keys and their values; launch help KEY explains one.")
    return "\n".join(lines) + "\n"


def help(line: Line) -> int:
    """Run `launch help [KEY]`."""
    if line.name is None:
        print(overview(), end="")
    elif line.name in VERBS:
        print(about_verb(VERBS[line.name], groups_of(line)), end="")
    else:
        print(text(line.name))
    return 0


def groups_of(line: Line) -> dict[str, list[str]]:
    """Return the groups with options to choose from. Options of the user's own directory come first."""
    where = sources(line.config_dir)
    own = Sources(where.directories[:-1]).groups()
    found = {group: list(dict.fromkeys([*own.get(group, []), *options])) for group, options in where.groups().items()}
    return {group: options for group, options in found.items() if options != ["default"]}


def _both(flag: Flag) -> str:
    """Return the spellings of a flag and the placeholder of its value."""
    return ", ".join(flag.spellings[::-1]) + (f" {flag.value}" if flag.value else "")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _fit(start: str, options: Sequence[str]) -> str:
    """Return one line with as many options as fit, and the number of the others."""
    shown = list(options)
    while True:
        more = len(options) - len(shown)
        line = start + ", ".join(shown) + (f", and {more} more" if more else "")
        if len(line) < WIDTH or len(shown) <= 1:
            return line
        shown.pop()
