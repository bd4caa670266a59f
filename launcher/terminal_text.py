"""Escapes text of runs, hosts and logs before it is printed, so that it cannot control the terminal.

A terminal interprets the characters after ESC or after a C1 control character as a command: to move the cursor, clear
the screen, set the title or write the clipboard. Marks that reverse the direction of text can disguise a line.
"""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, colours: bool = False) -> str:
    r"""Return text with control characters escaped (`\x1b`). Line breaks and tabs stay; colours are removed.

    Args:
        colours: keep sequences that set colours and bold, for a caller that parses them into styles.
    """
    if colours:
        return "".join(part if index % 2 else printable(part) for index, part in enumerate(_split(text)))
    return _CONTROL.sub(lambda found: _escaped(found[0]), _COLOURS.sub("", text))


def _split(text: str) -> list[str]:
    """Return the text between colour sequences and the sequences themselves, alternately."""
    return re.split(f"({_COLOURS.pattern})", text)


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
