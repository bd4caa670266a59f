"""`launch help`: what a key or a verb means."""

from __future__ import annotations

from launcher.cli.line import USAGE, Line
from launcher.cli.verbs import VERBS
from launcher.config.key_help import text


def help(line: Line) -> int:
    if line.name is None:
        print(USAGE, end="")
    elif line.name in VERBS:
        verb = VERBS[line.name]
        print(f"launch {verb.usage}\n  {verb.summary.replace(chr(10), chr(10) + '  ')}")
        if verb.composes:
            print(f"  launch {verb.name} --help shows every group, key and default")
    else:
        print(text(line.name))
    return 0
